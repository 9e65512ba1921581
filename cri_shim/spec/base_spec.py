"""A base spec: an OCI runtime spec of the node's administrator, below everything that a request says.

Not a template: what the CRI has a field for is the request's alone, also where the request is silent. Invariant: a base
can add to a container and never change what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec

from cri_shim.spec import hooks
from cri_shim.spec.facts import Json

_OF_THE_REQUEST: Final = {
    "": ("ociVersion", "hostname", "domainname", "root"),
    "process": (
        *("args", "commandLine", "cwd", "user", "terminal", "consoleSize", "capabilities", "noNewPrivileges"),
        *("apparmorProfile", "selinuxLabel", "oomScoreAdj"),
    ),
    "linux": (
        *("namespaces", "cgroupsPath", "maskedPaths", "readonlyPaths", "rootfsPropagation", "mountLabel", "seccomp"),
        *("uidMappings", "gidMappings"),
    ),
    "linux.resources": ("cpu", "memory", "hugepageLimits", "unified"),
}


class _Named(msgspec.Struct, frozen=True):
    path: str


class _Mount(msgspec.Struct, frozen=True):
    destination: str


class _Rlimit(msgspec.Struct, frozen=True):
    type: str


class _Process(msgspec.Struct, frozen=True):
    env: list[str] = []
    rlimits: list[_Rlimit] = []


class _Resources(msgspec.Struct, frozen=True):
    devices: list[dict[str, Any]] = []


class _Linux(msgspec.Struct, frozen=True):
    devices: list[_Named] = []
    resources: _Resources = _Resources()


class _Base(msgspec.Struct, frozen=True):
    """The parts that have to be of the right shape to be merged."""

    process: _Process = _Process()
    mounts: list[_Mount] = []
    hooks: dict[str, list[_Named]] = {}
    linux: _Linux = _Linux()


def parse_base(data: bytes) -> Json:
    """The base of a file, without what is the request's. ValueError says what is wrong with it."""
    msgspec.json.decode(data, type=_Base)
    base: Json = msgspec.json.decode(data, type=dict)
    for place, keys in _OF_THE_REQUEST.items():
        part: Json = base
        for name in place.split(".") if place else ():
            part = part.get(name, {})
        for key in keys:
            part.pop(key, None)
    unknown = sorted(set(base.get("hooks", {})) - set(hooks.STAGES))
    if unknown:
        raise ValueError(f"hooks: there is no stage {unknown[0]!r}")
    return base


def onto(base: Json, document: Json) -> Json:
    """The document with what the base adds to it. Of two things with one name that of the document stays."""
    merged = _objects(base, document)
    process, linux = merged["process"], merged["linux"]
    of_base, own = base.get("process", {}), document["process"]
    process["env"] = _lists(of_base.get("env"), own["env"], lambda item: item.partition("=")[0])
    if rlimits := _lists(of_base.get("rlimits"), own.get("rlimits"), lambda item: item["type"]):
        process["rlimits"] = rlimits
    if mounts := base.get("mounts"):
        mounts = _lists(mounts, document["mounts"], lambda item: item["destination"])
        # A parent that came last would hide what is mounted below it.
        merged["mounts"] = sorted(mounts, key=lambda item: item["destination"].rstrip("/").count("/"))
    of_base, own = base.get("linux", {}), document["linux"]
    linux["devices"] = _lists(of_base.get("devices"), own["devices"], lambda item: item["path"])
    # The first rule denies all; what a base denies again at large would take away what was asked for.
    rules = [rule for rule in of_base.get("resources", {}).get("devices", ()) if rule.get("allow") or "type" in rule]
    linux["resources"] = {**linux["resources"], "devices": [*own["resources"]["devices"], *rules]}
    if found := hooks.merged(base.get("hooks", {}), document.get("hooks", {})):
        merged["hooks"] = found
    return merged


def _objects(base: Json, document: Json) -> Json:
    merged = {**base, **document}
    for key in base.keys() & document.keys():
        if isinstance(base[key], dict) and isinstance(document[key], dict):
            merged[key] = _objects(base[key], document[key])
    return merged


def _lists(base: Sequence[Any] | None, own: Iterable[Any] | None, name: Callable[[Any], str]) -> list[Any]:
    listed = list(own or ())
    taken = {name(item) for item in listed}
    return [*(item for item in base or () if name(item) not in taken), *listed]
