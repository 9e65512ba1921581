"""Where a container's cgroup is, for both cgroup drivers: names only.

No I/O: `cri_shim.adapters.cgroups` acts on these names. Invariant: what the OCI runtime makes of
`cgroups_path_for_spec` is the directory that `cgroup_dir` names.
"""

from __future__ import annotations

import enum
from typing import Final

from cri_shim.model.errors import InvalidArgument
from cri_shim.spec.paths import check_length

SCOPE_PREFIX: Final = "cri-shim"
_DEFAULT_SLICE: Final = "system.slice"
_SLICE: Final = ".slice"


class Driver(enum.Enum):
    """Who makes cgroups: the runtime, as directories, or systemd, as slices and scopes (CRI `CgroupDriver`)."""

    CGROUPFS = "cgroupfs"
    SYSTEMD = "systemd"


def resolve_driver(setting: str, *, systemd_runs: bool) -> Driver:
    """The driver for the configured `cgroup_driver`: `auto` is systemd where systemd is the service manager."""
    if setting == "auto":
        return Driver.SYSTEMD if systemd_runs else Driver.CGROUPFS
    return Driver(setting)


def cgroups_path_for_spec(parent: str, container_id: str, driver: Driver) -> str:
    """`linux.cgroupsPath` of the OCI spec: a path from the hierarchy's root, or `slice:prefix:name` for systemd.

    `parent` is CRI `LinuxPodSandboxConfig.cgroup_parent`; empty is the root, or system.slice. InvalidArgument when its
    form is that of the other driver.
    """
    _check_form(parent, driver)
    if driver is Driver.SYSTEMD:
        return f"{_slice_name(parent)}:{SCOPE_PREFIX}:{container_id}"
    return f"/{_join(parent, container_id)}"


def parent_of(cgroups_path: str) -> str:
    """The parent in what `cgroups_path_for_spec` has made; the default one by its name."""
    if cgroups_path.startswith("/"):
        return cgroups_path.rpartition("/")[0]
    return cgroups_path.partition(":")[0]


def annotations_for_spec(driver: Driver) -> dict[str, str]:
    """What keeps the invariant with systemd: crun would put the processes into a cgroup `container` below its scope."""
    return {"run.oci.systemd.subgroup": ""} if driver is Driver.SYSTEMD else {}


def cgroup_dir(parent: str, container_id: str, driver: Driver) -> str:
    """The container's directory, relative to a hierarchy's root: what the runtime makes of the path above."""
    _check_form(parent, driver)
    if driver is Driver.SYSTEMD:
        slice_name, scope = container_scope(parent, container_id)
        return _join(_expand_slice(slice_name), scope)
    return _join(parent, container_id)


def container_scope(parent: str, container_id: str) -> tuple[str, str]:
    """The same for systemd: the slice, and the name of the scope in it."""
    _check_form(parent, Driver.SYSTEMD)
    return _slice_name(parent), f"{SCOPE_PREFIX}-{container_id}.scope"


def pod_dir(parent: str, driver: Driver) -> str:
    """The directory that the kubelet made for the pod; empty where `parent` names none of the pod's own."""
    _check_form(parent, driver)
    if driver is Driver.SYSTEMD:
        return _expand_slice(_slice_name(parent)) if parent else ""
    return _join(parent)


def monitor_dir(parent: str, container_id: str, driver: Driver) -> str:
    """The directory of the container's conmon, beside the container's own (a scope with systemd)."""
    if driver is Driver.SYSTEMD:
        slice_name, scope = monitor_scope(parent, container_id)
        return _join(_expand_slice(slice_name), scope)
    _check_form(parent, driver)
    return _join(parent, _monitor_name(container_id))


def monitor_scope(parent: str, container_id: str) -> tuple[str, str]:
    """The same for systemd: the slice, and the name of the scope in it."""
    _check_form(parent, Driver.SYSTEMD)
    return _slice_name(parent), f"{_monitor_name(container_id)}.scope"


def _monitor_name(container_id: str) -> str:
    return f"{SCOPE_PREFIX}-conmon-{container_id}"


def _check_form(parent: str, driver: Driver) -> None:
    if ".." in parent.split("/") or not parent.isprintable():
        msg = f"linux.cgroup_parent {parent!r} is not a cgroup path"
        raise InvalidArgument(msg)
    check_length("linux.cgroup_parent", parent)
    is_slice = parent.endswith(_SLICE)
    if driver is Driver.CGROUPFS and is_slice:
        msg = f"linux.cgroup_parent {parent!r} is a systemd slice, but the cgroup driver is cgroupfs"
    elif driver is Driver.SYSTEMD and parent and not is_slice:
        msg = f"linux.cgroup_parent {parent!r} is a cgroupfs path, but the cgroup driver is systemd"
    else:
        return
    raise InvalidArgument(msg, hint="set the same cgroup driver in cri-shim (cgroup_driver) and in the kubelet")


def _slice_name(parent: str) -> str:
    return parent.rsplit("/", 1)[-1] or _DEFAULT_SLICE


def _expand_slice(name: str) -> str:
    """`a-b.slice` lives in `a.slice` (systemd.slice(5)); `-.slice` is the root."""
    stem = name.removesuffix(_SLICE)
    if stem == "-":
        return ""
    parts = stem.split("-")
    if not all(parts):
        msg = f"linux.cgroup_parent {name!r} is not a name of a systemd slice"
        raise InvalidArgument(msg, hint="no dash at either end, no two in a row")
    return "/".join("-".join(parts[:depth]) + _SLICE for depth in range(1, len(parts) + 1))


def _join(parent: str, *names: str) -> str:
    return "/".join([*(part for part in parent.split("/") if part not in {"", "."}), *names])
