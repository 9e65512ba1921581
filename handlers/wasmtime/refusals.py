"""What of a container request a module in a thread cannot be given: each field is refused by name, none is ignored.

Fields that change nothing for a module are accepted: the default capabilities and less, a default or unconfined
profile, masked paths of the kernel's file systems, supplementary groups, hints for the kernel's memory management.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cri_shim.model.capabilities import DEFAULT_CAPABILITIES
from cri_shim.model.errors import CriShimError, InvalidArgument
from cri_shim.model.handler import ContainerPlan
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.apparmor import asked_profile
from cri_shim.spec.mounts import mount_options
from cri_shim.spec.security import seccomp_profile, wanted_capabilities

_SECURITY: Final = "linux.security_context"
_NAMESPACES: Final = f"{_SECURITY}.namespace_options"
_CDI: Final = "cdi.k8s.io/"
_HIDDEN_ANYWAY: Final = ("/proc/", "/sys/", "/dev/")
"""A module sees no kernel file system, so that nothing is left to mask there."""


@dataclass(frozen=True, slots=True)
class _Rule:
    field: str
    breaks: Callable[[pb.ContainerConfig], bool]
    why: str
    error: type[CriShimError] = InvalidArgument


def _security(config: pb.ContainerConfig) -> pb.LinuxContainerSecurityContext:
    return config.linux.security_context


def _namespaces(config: pb.ContainerConfig) -> pb.NamespaceOption:
    return _security(config).namespace_options


def _has_user_namespace(config: pb.ContainerConfig) -> bool:
    options = _namespaces(config)
    return options.HasField("userns_options") and options.userns_options.mode != pb.NamespaceMode.NODE


def _hides_files(config: pb.ContainerConfig) -> bool:
    paths = (*_security(config).masked_paths, *_security(config).readonly_paths)
    return any(not f"{path}/".startswith(_HIDDEN_ANYWAY) for path in paths)


_LOCALHOST: Final = pb.SecurityProfile.Localhost

_RULES: Final = (
    _Rule("devices", lambda c: bool(c.devices), "a Wasm module has no access to devices"),
    _Rule("CDI_devices", lambda c: bool(c.CDI_devices), "a Wasm module has no access to devices"),
    _Rule(
        "annotations",
        lambda c: any(key.startswith(_CDI) for key in c.annotations),
        f"{_CDI}*: a Wasm module has no access to devices",
    ),
    _Rule(f"{_SECURITY}.privileged", lambda c: _security(c).privileged, "a Wasm module is never privileged"),
    _Rule(
        f"{_NAMESPACES}.pid",
        lambda c: _namespaces(c).pid == pb.NamespaceMode.NODE,
        "NODE (hostPID): a Wasm module sees no processes",
    ),
    _Rule(
        f"{_NAMESPACES}.pid",
        lambda c: _namespaces(c).pid == pb.NamespaceMode.TARGET,
        "TARGET: a Wasm module sees no processes of another container",
    ),
    _Rule(
        f"{_NAMESPACES}.ipc",
        lambda c: _namespaces(c).ipc == pb.NamespaceMode.NODE,
        "NODE (hostIPC): a Wasm module has no System V IPC",
    ),
    _Rule(f"{_NAMESPACES}.userns_options", _has_user_namespace, "a Wasm container has no user namespace"),
    _Rule(
        f"{_SECURITY}.capabilities.add_capabilities",
        lambda c: not _security(c).privileged and not wanted_capabilities(_security(c)) <= DEFAULT_CAPABILITIES,
        "a Wasm module cannot use capabilities beyond the default ones",
    ),
    _Rule(
        f"{_SECURITY}.seccomp",
        lambda c: seccomp_profile(_security(c)).profile_type == _LOCALHOST,
        "a Localhost profile cannot be applied to a Wasm module, which makes no system calls of its own",
    ),
    _Rule(
        f"{_SECURITY}.apparmor",
        lambda c: (asked := asked_profile(_security(c))) is not None and asked.profile_type == _LOCALHOST,
        "a Localhost profile cannot be applied to a Wasm module that runs in the daemon",
    ),
    _Rule(
        f"{_SECURITY}.selinux_options",
        lambda c: _security(c).selinux_options != pb.SELinuxOption(),
        "an SELinux label cannot be applied to a Wasm module that runs in the daemon",
    ),
    _Rule(f"{_SECURITY}.masked_paths", _hides_files, "or readonly_paths: only kernel file systems can be hidden"),
)


@dataclass(frozen=True, slots=True)
class _MountRule:
    field: str
    breaks: Callable[[pb.Mount], bool]
    why: str
    error: type[CriShimError] = InvalidArgument


_MOUNT_RULES: Final = (
    _MountRule("uidMappings", lambda m: bool(m.uidMappings), "a Wasm container has no idmapped mounts"),
    _MountRule("gidMappings", lambda m: bool(m.gidMappings), "a Wasm container has no idmapped mounts"),
    _MountRule(
        "propagation",
        lambda m: m.propagation == pb.MountPropagation.PROPAGATION_BIDIRECTIONAL,
        "BIDIRECTIONAL: a Wasm module cannot mount",
    ),
    _MountRule("recursive_read_only", lambda m: m.recursive_read_only and not m.readonly, "needs readonly"),
    _MountRule(
        "recursive_read_only",
        lambda m: m.recursive_read_only and m.propagation != pb.MountPropagation.PROPAGATION_PRIVATE,
        "needs PROPAGATION_PRIVATE",
    ),
)


def refuse_in_process(resources: pb.LinuxContainerResources) -> None:
    """Likewise for what a worker has and a thread of the daemon has not."""
    if resources.unified:
        msg = "linux.resources.unified: a Wasm module in the daemon's process has no cgroup of its own"
        raise InvalidArgument(msg, hint="isolation: process has one")


def refuse(plan: ContainerPlan) -> None:
    """Raise for the first field that cannot be honoured; the error names it."""
    if plan.infra:
        msg = "a shared PID namespace needs a Linux runtime"
        raise InvalidArgument(msg, hint="run the pod under a handler of kind oci")
    for rule in _RULES:
        if rule.breaks(plan.config):
            msg = f"{rule.field}: {rule.why}"
            raise rule.error(msg)
    for mount in plan.config.mounts:
        mount_options(mount)
        for mount_rule in _MOUNT_RULES:
            if mount_rule.breaks(mount):
                msg = f"mounts: {mount_rule.field} of {mount.container_path}: {mount_rule.why}"
                raise mount_rule.error(msg)
