"""Reads the facts that a spec is built from: of the node once, of a container by what its configuration names.

Everything blocks and belongs into a thread. Invariant: nothing here decides; `cri_shim.spec` does.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from cri_shim.adapters import blockio, cdi
from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.hooks import hook_files
from cri_shim.adapters.limit_facts import limit_facts
from cri_shim.adapters.oci_runtime import Identity
from cri_shim.kernel import mounts, selinux
from cri_shim.kernel.release import kernel_release
from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.handler import ContainerPlan
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.cdi import Edits, device_names
from cri_shim.spec.devices import HOST_DEVICES
from cri_shim.spec.facts import ContainerFacts, DeviceNode, HostFacts, Json, MountSource, Propagation
from cri_shim.spec.security import seccomp_profile
from cri_shim.spec.ulimits import parse_ulimits
from handlers.oci.options import OciOptions

_PROFILE_LIMIT: Final = 4 << 20
_MOUNT_SETATTR_KERNEL: Final = (5, 12)
# Made anew for each container, or of this host's sessions only.
_NOT_PASSED_ON: Final = frozenset({"pts", "shm", "fd", "mqueue", ".udev", ".lxc", ".lxd-mounts"})
_CONSOLE: Final = "console"
_RESTRICTIONS: Final = (("nosuid", os.ST_NOSUID), ("nodev", os.ST_NODEV), ("noexec", os.ST_NOEXEC))


def host_facts(identity: Identity, context: HandlerContext, options: OciOptions, base_spec: Json) -> HostFacts:
    """What is the same for every container of a runtime."""
    return HostFacts(
        **dataclasses.asdict(limit_facts(context, min_memory=options.min_memory)),
        oci_version=identity.version.spec,
        capabilities=context.capabilities,
        machine=platform.machine(),
        seccomp="\nSeccomp:" in Path("/proc/self/status").read_text(),
        apparmor=context.apparmor.enabled,
        apparmor_parser=bool(context.apparmor.parser),
        selinux=selinux.is_enabled(),
        recursive_read_only=identity.features.recursive_read_only and kernel_release() >= _MOUNT_SETATTR_KERNEL,
        idmapped_mounts=identity.features.user_namespaces and kernel_release() >= _MOUNT_SETATTR_KERNEL,
        wasm_engine=any(tag.startswith("WASM") for tag in identity.version.tags),
        base_spec=base_spec,
        default_capabilities=frozenset(options.default_capabilities),
        rlimits=parse_ulimits(options.default_ulimits),
        privileged_any_device=(
            not options.privileged_without_host_devices or options.privileged_without_host_devices_all_devices_allowed
        ),
    )


def container_facts(
    plan: ContainerPlan, options: OciOptions, apparmor_profiles: frozenset[str], apparmor_problem: str
) -> ContainerFacts:
    """What the configuration of one container names on the host. FailedPrecondition for what is not there."""
    config = plan.config
    devices = {device.host_path: tuple(_devices(device.host_path)) for device in config.devices}
    if config.linux.security_context.privileged and not options.privileged_without_host_devices:
        devices[HOST_DEVICES] = tuple(_below(HOST_DEVICES))
    return ContainerFacts(
        sources=_sources(config.mounts),
        devices=devices,
        seccomp=_localhost_profile(config.linux.security_context),
        apparmor_profiles=apparmor_profiles,
        apparmor_problem=apparmor_problem,
        block_io=blockio.of_container(config, plan.pod.config, options.blockio_config_file) if not plan.infra else {},
        hooks=tuple(hook_files(options.hooks_paths)),
        cdi=cdi.edits(names, options.cdi_paths) if (names := device_names(config)) else Edits(),
    )


def _sources(asked: Sequence[pb.Mount]) -> dict[str, MountSource]:
    found = {mount.host_path for mount in asked if os.path.exists(mount.host_path)}  # noqa: PTH110  of CRI, a string
    # Who asks for none need not wait for the mount table to be read.
    propagating = {mount.host_path for mount in asked if mount.propagation != pb.MountPropagation.PROPAGATION_PRIVATE}
    return {path: _source(path, propagates=path in propagating) for path in found}


def _source(host_path: str, *, propagates: bool) -> MountSource:
    resolved = Path(host_path).resolve()
    flags = os.statvfs(resolved).f_flag
    restrictions = tuple(option for option, flag in _RESTRICTIONS if flags & flag)
    propagation = Propagation.PRIVATE
    if propagates:
        tags = " ".join(mounts.propagation_of(resolved))
        if "shared:" in tags:
            propagation = Propagation.SHARED
        elif "master:" in tags:
            propagation = Propagation.SLAVE
    return MountSource(str(resolved), propagation, restrictions)


def _devices(host_path: str) -> Iterator[DeviceNode]:
    try:
        status = os.stat(host_path)  # noqa: PTH116  of CRI, a string
    except OSError as error:
        msg = f"devices: {host_path}: {error.strerror}"
        raise FailedPrecondition(msg) from error
    if stat.S_ISDIR(status.st_mode):
        yield from _below(host_path)
    elif _is_device(status):
        yield _node("", status)
    else:
        msg = f"devices: {host_path} is neither a device nor a directory"
        raise InvalidArgument(msg)


def _below(directory: str) -> Iterator[DeviceNode]:
    for at, names, files in os.walk(directory):
        names[:] = [name for name in names if name not in _NOT_PASSED_ON]
        for file in files:
            path = os.path.join(at, file)  # noqa: PTH118  hundreds of names: no Path objects
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                continue
            if _is_device(status) and file != _CONSOLE:
                yield _node(os.path.relpath(path, directory), status)


def _is_device(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)


def _node(path: str, status: os.stat_result) -> DeviceNode:
    return DeviceNode(
        path=path,
        block=stat.S_ISBLK(status.st_mode),
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
    )


def _localhost_profile(security: pb.LinuxContainerSecurityContext) -> Json | None:
    profile = seccomp_profile(security)
    if security.privileged or profile.profile_type != pb.SecurityProfile.Localhost:
        return None
    path = Path(profile.localhost_ref)
    if not path.is_absolute():
        msg = f"linux.security_context.seccomp.localhost_ref {profile.localhost_ref!r} is not an absolute path"
        raise InvalidArgument(msg)
    try:
        with path.open("rb") as file:
            content = file.read(_PROFILE_LIMIT)
        document: Json = msgspec.json.decode(content, type=dict)
    except OSError as error:
        msg = f"linux.security_context.seccomp.localhost_ref {path}: {error.strerror}"
        raise FailedPrecondition(msg) from error
    except msgspec.DecodeError as error:
        msg = f"linux.security_context.seccomp.localhost_ref {path} is not a seccomp profile: {error}"
        raise InvalidArgument(msg) from error
    return document
