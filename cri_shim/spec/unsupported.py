"""Fields of a request that this version, or this node, cannot honour: each is refused by name, none is ignored.

Not the checks of values that are supported. Invariant: a field of `ContainerConfig` that is neither read in
`cri_shim.spec` nor listed here does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cri_shim.model.errors import Code, CriShimError, FailedPrecondition, InvalidArgument, Unimplemented
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.facts import HostFacts
from cri_shim.spec.security import seccomp_profile

_RRO_PREFIX = "RROUnsupported"
"""The kubelet turns an error that starts like this into a condition of its own (CRI v1, `recursive_read_only`)."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """`breaks` gets the configuration and the host's facts."""

    field: str
    breaks: Callable[[pb.ContainerConfig, HostFacts], bool]
    why: str
    error: type[CriShimError] = Unimplemented


def _security(config: pb.ContainerConfig) -> pb.LinuxContainerSecurityContext:
    return config.linux.security_context


def _profile_asked(profile: pb.SecurityProfile) -> bool:
    return profile.profile_type != pb.SecurityProfile.Unconfined


_NOT_YET = "is not supported by this version"
_LISTED = "linux.security_context"

_CONTAINER_RULES = (
    _Rule(
        f"{_LISTED}.seccomp",
        lambda c, h: not _security(c).privileged and _profile_asked(seccomp_profile(_security(c))) and not h.seccomp,
        "this kernel has no seccomp filters",
        FailedPrecondition,
    ),
)


@dataclass(frozen=True, slots=True)
class _MountRule:
    field: str
    breaks: Callable[[pb.Mount, HostFacts], bool]
    why: str
    error: type[CriShimError] = Unimplemented


_MOUNT_RULES = (
    _MountRule(
        "uidMappings and gidMappings",
        lambda m, _: bool(m.uidMappings) != bool(m.gidMappings),
        "one needs the other",
        InvalidArgument,
    ),
    _MountRule(
        "uidMappings and gidMappings",
        lambda m, _: any(mapping.length == 0 for mapping in (*m.uidMappings, *m.gidMappings)),
        "a mapping has at least one id",
        InvalidArgument,
    ),
    _MountRule(
        "uidMappings and gidMappings",
        lambda m, h: bool(m.uidMappings) and not h.idmapped_mounts,
        "this runtime or kernel has no idmapped mounts",
        FailedPrecondition,
    ),
    _MountRule(
        "recursive_read_only", lambda m, _: m.recursive_read_only and not m.readonly, "needs readonly", InvalidArgument
    ),
    _MountRule(
        "recursive_read_only",
        lambda m, _: m.recursive_read_only and m.propagation != pb.MountPropagation.PROPAGATION_PRIVATE,
        "needs PROPAGATION_PRIVATE",
        InvalidArgument,
    ),
)


class RecursiveReadOnlyUnsupported(CriShimError):
    """A mount asks for `recursive_read_only`, which the runtime or the kernel lacks."""

    code = Code.FAILED_PRECONDITION


def refuse_unsupported(config: pb.ContainerConfig, host: HostFacts) -> None:
    """Raise for the first field that cannot be honoured; the error names it."""
    for rule in _CONTAINER_RULES:
        if rule.breaks(config, host):
            msg = f"{rule.field}: {rule.why}"
            raise rule.error(msg)
    for mount in config.mounts:
        _refuse_mount(mount, host)


def _refuse_mount(mount: pb.Mount, host: HostFacts) -> None:
    for rule in _MOUNT_RULES:
        if rule.breaks(mount, host):
            msg = f"mounts: {rule.field} of {mount.container_path}: {rule.why}"
            raise rule.error(msg)
    if mount.recursive_read_only and not host.recursive_read_only:
        msg = f"{_RRO_PREFIX}: recursive_read_only of {mount.container_path}: this runtime or kernel is not able to"
        raise RecursiveReadOnlyUnsupported(msg)
