"""Device nodes of a container and the rules of its devices cgroup.

Not the runtime's own default devices (null, zero, tty…), which every runtime adds. Invariant: all is denied first.
"""

from __future__ import annotations

from collections.abc import Iterator

from cri_shim.model.errors import InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.facts import ContainerFacts, DeviceNode, HostFacts, Json
from cri_shim.spec.paths import rooted

HOST_DEVICES = "/dev"
"""Key of the host's own devices in `ContainerFacts.devices`."""

_DENY_ALL: Json = {"allow": False, "access": "rwm"}
_ALLOW_ALL: Json = {"allow": True, "access": "rwm"}


def devices(config: pb.ContainerConfig, host: HostFacts, found: ContainerFacts) -> tuple[list[Json], list[Json]]:
    """`linux.devices` and `linux.resources.devices` (OCI runtime-spec, config-linux)."""
    nodes: dict[str, Json] = {}
    rules = [_DENY_ALL]
    if config.linux.security_context.privileged:
        for device in found.devices.get(HOST_DEVICES, ()):
            path = rooted(f"{HOST_DEVICES}/{device.path}")
            nodes[path] = _node(path, device)
        rules = [_ALLOW_ALL] if host.privileged_any_device else rules
    for path, access, device in _listed(config, found):
        nodes[path] = _node(path, device)
        rules.append(_rule(device, access))
    return list(nodes.values()), rules


def _listed(config: pb.ContainerConfig, found: ContainerFacts) -> Iterator[tuple[str, str, DeviceNode]]:
    for asked in config.devices:
        access = asked.permissions or "rwm"
        if set(access) - set("rwm"):
            msg = f"devices: permissions {access!r} of {asked.host_path} are not a subset of rwm"
            raise InvalidArgument(msg)
        target = asked.container_path or asked.host_path
        if not target.startswith("/"):
            msg = f"devices: container_path {target!r} is not absolute"
            raise InvalidArgument(msg)
        for device in found.devices.get(asked.host_path, ()):
            yield rooted(f"{target}/{device.path}"), access, device


def _node(path: str, device: DeviceNode) -> Json:
    return {
        "path": path,
        "type": "b" if device.block else "c",
        "major": device.major,
        "minor": device.minor,
        "fileMode": device.mode & 0o7777,
        "uid": device.uid,
        "gid": device.gid,
    }


def _rule(device: DeviceNode, access: str) -> Json:
    kind = "b" if device.block else "c"
    return {"allow": True, "type": kind, "major": device.major, "minor": device.minor, "access": access}
