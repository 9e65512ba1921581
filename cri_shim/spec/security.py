"""Capabilities, profiles, masked paths: what the first process may do.

Not the checks for what is unsupported (`cri_shim.spec.unsupported`). Invariant: a container is never given a capability
that the daemon does not hold itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from cri_shim.model import capabilities as known
from cri_shim.model.capabilities import DEFAULT_CAPABILITIES
from cri_shim.model.errors import InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.facts import ContainerFacts, HostFacts, Json
from cri_shim.spec.paths import check_path
from cri_shim.spec.seccomp_default import default_profile

_ALL = "ALL"
_LOCALHOST = "localhost/"


def wanted_capabilities(
    security: pb.LinuxContainerSecurityContext, default: frozenset[str] = DEFAULT_CAPABILITIES
) -> frozenset[str]:
    """What the request makes of the `default`, whoever has it: ALL first, then single additions, then single drops.

    InvalidArgument names a capability that Linux does not have.
    """
    if security.privileged:
        return frozenset(known.NAMES)
    asked = security.capabilities
    added = _names(asked.add_capabilities, "add_capabilities") | _names(
        asked.add_ambient_capabilities, "add_ambient_capabilities"
    )
    dropped = _names(asked.drop_capabilities, "drop_capabilities")
    wanted = frozenset() if _ALL in dropped else default
    if _ALL in added:
        wanted = frozenset(known.NAMES)
    return (wanted | (added - {_ALL})) - dropped


def added_capabilities(security: pb.LinuxContainerSecurityContext) -> frozenset[str]:
    """The ones that the request adds by name; ALL and privileged mean "what there is"."""
    return _names(security.capabilities.add_capabilities, "add_capabilities") - {_ALL}


def capabilities(security: pb.LinuxContainerSecurityContext, host: HostFacts) -> Json:
    """`process.capabilities` (OCI runtime-spec, config). Clamped to the daemon's own set."""
    given = wanted_capabilities(security, host.default_capabilities) & host.capabilities
    ambient = _names(security.capabilities.add_ambient_capabilities, "add_ambient_capabilities")
    kept = given if _ALL in ambient else given & ambient
    everything, inherited = _formatted(given), _formatted(kept)
    return {
        "bounding": everything,
        "effective": everything,
        "permitted": everything,
        "inheritable": inherited,
        "ambient": inherited,
    }


def seccomp(security: pb.LinuxContainerSecurityContext, host: HostFacts, found: ContainerFacts) -> Json | None:
    """`linux.seccomp`, None for no filter. A request without a profile is unconfined (CRI v1)."""
    if security.privileged:
        return None
    profile = seccomp_profile(security)
    match profile.profile_type:
        case pb.SecurityProfile.RuntimeDefault:
            given = wanted_capabilities(security, host.default_capabilities) & host.capabilities
            return default_profile(given, host.machine)
        case pb.SecurityProfile.Localhost:
            return found.seccomp
        case _:
            return None


def seccomp_profile(security: pb.LinuxContainerSecurityContext) -> pb.SecurityProfile:
    """The profile asked for, in the new form or, without that, in the old one."""
    if security.HasField("seccomp"):
        return security.seccomp
    return named_profile(security.seccomp_profile_path, "seccomp_profile_path")


def named_profile(text: str, field: str) -> pb.SecurityProfile:
    """The old form of a profile: a word, or `localhost/NAME`. InvalidArgument for any other."""
    if text in {"", "unconfined"}:
        return pb.SecurityProfile(profile_type=pb.SecurityProfile.Unconfined)
    if text in {"runtime/default", "docker/default"}:
        return pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    if text.startswith(_LOCALHOST):
        reference = text.removeprefix(_LOCALHOST)
        return pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref=reference)
    msg = f"linux.security_context.{field} {text!r} is not runtime/default, unconfined or localhost/NAME"
    raise InvalidArgument(msg)


def masks(security: pb.LinuxContainerSecurityContext) -> Json:
    """`linux.maskedPaths` and `readonlyPaths`, verbatim: an empty list masks nothing. None of them when privileged."""
    for field, paths in (("masked_paths", security.masked_paths), ("readonly_paths", security.readonly_paths)):
        for path in paths:
            check_path(f"linux.security_context.{field}", path)
    if security.privileged:
        return {}
    return {"maskedPaths": list(security.masked_paths), "readonlyPaths": list(security.readonly_paths)}


def _names(names: Iterable[str], field: str) -> frozenset[str]:
    parsed = frozenset(name.upper().removeprefix("CAP_") for name in names)
    for unknown in parsed - {_ALL, *known.NAMES}:
        msg = f"linux.security_context.capabilities.{field}: Linux has no capability {unknown!r}"
        raise InvalidArgument(msg)
    return parsed


def _formatted(names: frozenset[str]) -> list[str]:
    return [f"CAP_{name}" for name in known.NAMES if name in names]
