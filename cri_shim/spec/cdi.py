"""CDI: devices that a vendor describes in files, and what they change in a container (Container Device Interface 1.0).

Not the reading of the files and of the host's devices (`cri_shim.adapters.cdi`). Invariant: what a spec file says is
done in full, or the device cannot be used: an edit that is not known here is an error and never left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import hooks

if TYPE_CHECKING:
    from cri_shim.spec.facts import Json

ANNOTATION: Final = "cdi.k8s.io/"
"""Prefix of the annotations that named CDI devices before the CRI had a field for them."""

_KIND: Final = re.compile(r"[A-Za-z]([\w.-]*[A-Za-z0-9])?/[A-Za-z]([\w-]*[A-Za-z0-9])?", re.ASCII)
_DEVICE: Final = re.compile(r"[A-Za-z0-9]([\w.:-]*[A-Za-z0-9])?", re.ASCII)
_VERSION: Final = re.compile(r"v?[01]\.\d+\.\d+(-[\w.]+)?", re.ASCII)


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A mapping whose keys are all known."""


class DeviceNode(_Part, frozen=True, kw_only=True):
    """A device node of the container. Without `type` or `major` it is that of `host_path`, or of `path`."""

    path: str
    host_path: str = ""
    type: Literal["", "b", "c", "u", "p"] = ""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None


class Mount(_Part, frozen=True, kw_only=True):
    """As in the OCI runtime spec, under CDI's names."""

    host_path: str
    container_path: str
    options: tuple[str, ...] = ()
    type: str = ""


class Hook(_Part, frozen=True, kw_only=True):
    """An OCI hook; `hook_name` is the key of its list."""

    hook_name: hooks.Stage
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


class Edits(_Part, frozen=True, kw_only=True):
    """`containerEdits`."""

    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[Mount, ...] = ()
    hooks: tuple[Hook, ...] = ()
    additional_gids: tuple[int, ...] = ()
    intel_rdt: dict[str, Any] | None = None


class Device(_Part, frozen=True, kw_only=True):
    """One device of a spec file."""

    name: str
    container_edits: Edits
    annotations: dict[str, str] = {}


class Spec(_Part, frozen=True, kw_only=True):
    """A spec file. Its own edits are made once for a container that has any of its devices."""

    cdi_version: str
    kind: str
    devices: tuple[Device, ...]
    container_edits: Edits = Edits()
    annotations: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class SpecFile:
    """A spec and where it is from. Of two files with one device that of the higher priority wins."""

    path: str
    priority: int
    spec: Spec


def device_names(config: pb.ContainerConfig) -> tuple[str, ...]:
    """Qualified names of the CDI devices of a request, each once: the field's, then the annotations'.

    InvalidArgument for what is no `vendor/class=name`.
    """
    named = [("CDI_devices", device.name) for device in config.CDI_devices]
    for key in sorted(key for key in config.annotations if key.startswith(ANNOTATION)):
        named += [(f"annotations {key}", name.strip()) for name in config.annotations[key].split(",")]
    for field, name in named:
        kind, _, device = name.partition("=")
        if _KIND.fullmatch(kind) is None or _DEVICE.fullmatch(device) is None:
            msg = f"{field}: {name[:100]!r} is not of the form vendor/class=name"
            raise InvalidArgument(msg)
    return tuple(dict.fromkeys(name for _, name in named))


def parse_spec(data: bytes, *, yaml: bool) -> Spec:
    """Parse a spec file. ValueError says what is wrong with it."""
    spec = msgspec.yaml.decode(data, type=Spec) if yaml else msgspec.json.decode(data, type=Spec)
    if _VERSION.fullmatch(spec.cdi_version) is None:
        raise ValueError(f"cdiVersion {spec.cdi_version!r} is not known")
    if _KIND.fullmatch(spec.kind) is None:
        raise ValueError(f"kind {spec.kind!r} is not of the form vendor/class")
    names = [device.name for device in spec.devices]
    wrong = next((name for name in names if _DEVICE.fullmatch(name) is None or names.count(name) > 1), None)
    if wrong is not None:
        raise ValueError(f"device {wrong!r} is listed twice, or its name is not a valid one")
    for edits in (spec.container_edits, *(device.container_edits for device in spec.devices)):
        _check(edits)
    return spec


def resolve(names: Sequence[str], files: Iterable[SpecFile]) -> Edits:
    """All that the named devices change, in their order. FailedPrecondition names the first that is not to be had."""
    found: dict[str, list[tuple[SpecFile, Device]]] = {}
    for file in files:
        for device in file.spec.devices:
            found.setdefault(f"{file.spec.kind}={device.name}", []).append((file, device))
    parts: list[Edits] = []
    begun: set[str] = set()
    for name in names:
        file, device = _only(name, found.get(name, []))
        if file.path not in begun:
            begun.add(file.path)
            parts.append(file.spec.container_edits)
        parts.append(device.container_edits)
    return _together(parts)


def apply(document: Json, edits: Edits) -> Json:
    """The OCI spec with the edits made; every device node has its type and numbers by now."""
    process, linux = document["process"], document["linux"]
    user = process["user"]
    nodes = {node.path: _node(node, user) for node in edits.device_nodes}
    replaced = {mount.container_path for mount in edits.mounts}
    mounts = [mount for mount in document["mounts"] if mount["destination"] not in replaced]
    gids = dict.fromkeys([*user["additionalGids"], *(gid for gid in edits.additional_gids if gid)])
    resources = linux["resources"]
    return {
        **document,
        "process": {
            **process,
            "env": _merged_env(process["env"], edits.env),
            "user": {**user, "additionalGids": list(gids)},
        },
        # A parent that came last would hide what is mounted below it.
        "mounts": sorted([*mounts, *map(_mount, edits.mounts)], key=lambda mount: mount["destination"].count("/")),
        "linux": {
            **linux,
            "devices": [*(node for node in linux["devices"] if node["path"] not in nodes), *nodes.values()],
            "resources": {**resources, "devices": [*resources["devices"], *_rules(edits.device_nodes)]},
            **({"intelRdt": edits.intel_rdt} if edits.intel_rdt else {}),
        },
        **({"hooks": hooks.merged(document.get("hooks", {}), _by_stage(edits.hooks))} if edits.hooks else {}),
    }


def _check(edits: Edits) -> None:
    for variable in edits.env:
        if not variable.partition("=")[0] or "=" not in variable:
            raise ValueError(f"env {variable!r} is not of the form NAME=value")
    paths = (
        *(node.path for node in edits.device_nodes),
        *(mount.container_path for mount in edits.mounts),
        *(hook.path for hook in edits.hooks),
    )
    for path in paths:
        if not path.startswith("/"):
            raise ValueError(f"{path!r} is not an absolute path")
    for node in edits.device_nodes:
        if set(node.permissions) - set("rwm"):
            raise ValueError(f"permissions {node.permissions!r} of {node.path} are not a subset of rwm")


def _only(name: str, found: Sequence[tuple[SpecFile, Device]]) -> tuple[SpecFile, Device]:
    if not found:
        msg = f"CDI_devices: {name} is in no spec file of this node"
        raise FailedPrecondition(msg)
    highest = max(file.priority for file, _ in found)
    best = [(file, device) for file, device in found if file.priority == highest]
    if len(best) > 1:
        msg = f"CDI_devices: {name} is ambiguous, it is in {' and in '.join(file.path for file, _ in best)}"
        raise FailedPrecondition(msg)
    return best[0]


def _together(parts: Sequence[Edits]) -> Edits:
    rdt = [part.intel_rdt for part in parts if part.intel_rdt]
    return Edits(
        env=tuple(item for part in parts for item in part.env),
        device_nodes=tuple(item for part in parts for item in part.device_nodes),
        mounts=tuple(item for part in parts for item in part.mounts),
        hooks=tuple(item for part in parts for item in part.hooks),
        additional_gids=tuple(item for part in parts for item in part.additional_gids),
        intel_rdt=rdt[-1] if rdt else None,
    )


def _merged_env(env: Sequence[str], further: Sequence[str]) -> list[str]:
    """Later ones win, in the place of the first."""
    merged = {item.partition("=")[0]: item for item in (*env, *further)}
    return list(merged.values())


def _node(node: DeviceNode, user: Mapping[str, int]) -> Json:
    """A node that names no owner is the user's, who could not open it otherwise (as CDI's own library has it)."""
    made: Json = {
        "path": node.path,
        "type": node.type,
        "uid": node.uid if node.uid is not None else user["uid"],
        "gid": node.gid if node.gid is not None else user["gid"],
    }
    if node.type != "p":
        made |= {"major": node.major, "minor": node.minor}
    if node.file_mode is not None:
        made["fileMode"] = node.file_mode
    return made


def _rules(nodes: Sequence[DeviceNode]) -> list[Json]:
    return [
        {
            "allow": True,
            "type": "b" if node.type == "b" else "c",
            "major": node.major,
            "minor": node.minor,
            "access": node.permissions or "rwm",
        }
        for node in nodes
        if node.type != "p"
    ]


def _mount(mount: Mount) -> Json:
    kind = mount.type or ("bind" if {"bind", "rbind"} & set(mount.options) else "")
    made: Json = {"destination": mount.container_path, "source": mount.host_path, "options": list(mount.options)}
    return made | ({"type": kind} if kind else {"type": "bind", "options": [*made["options"], "rbind"]})


def _by_stage(listed: Sequence[Hook]) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for hook in listed:
        made: Json = {"path": hook.path, "args": list(hook.args), "env": list(hook.env)}
        made |= {} if hook.timeout is None else {"timeout": hook.timeout}
        found.setdefault(hook.hook_name, []).append(made)
    return found
