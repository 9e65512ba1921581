"""The cgroup of a container that is one process of ours: make it with its limits, place the process, change the limits.

Not for what an OCI runtime runs, which makes its own, and not for killing and removing (`cri_shim.adapters.cgroups`).
Everything blocks and belongs into a thread. Invariant: a process is placed only in directories whose limits hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cri_shim.adapters.cgroups import Cgroups, Version
from cri_shim.model.errors import FailedPrecondition
from cri_shim.spec.cgroup_limits import Setting, settings
from cri_shim.spec.cgroup_plan import Driver, cgroup_dir
from cri_shim.spec.facts import Json

_CPUSET: Final = ("cpuset.cpus", "cpuset.mems")


class ProcessCgroups:
    """All by the parent that the kubelet names, and the container's id."""

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        self._version = 2 if cgroups.host.version is Version.V2 else 1

    def make(self, parent: str, container_id: str, resources: Json) -> None:
        """The directories with the limits of `linux.resources` (OCI). FailedPrecondition names what is refused.

        What was made stays then: `Cgroups.remove` takes it away.
        """
        if self._cgroups.driver is Driver.SYSTEMD:
            msg = "isolation: process is not supported with the systemd cgroup driver yet"
            raise FailedPrecondition(msg, hint="use isolation: in-process, or cgroup_driver: cgroupfs")
        place = cgroup_dir(parent, container_id, self._cgroups.driver)
        wanted = settings(resources, self._version)
        for root in self._cgroups.host.hierarchies:
            if self._version > 1:
                _enable_controllers(root, place)
            (root / place).mkdir(parents=True, exist_ok=True)
        if self._version == 1 and "cpuset" in self._cgroups.host.controllers:
            _inherit_cpuset(self._cgroups.host.controllers["cpuset"], place)
        self._write(place, wanted)

    def place(self, pid: int, parent: str, container_id: str) -> None:
        """Move a process of one thread in. OSError."""
        place = cgroup_dir(parent, container_id, self._cgroups.driver)
        for root in self._cgroups.host.hierarchies:
            (root / place / "cgroup.procs").write_text(str(pid))

    def limit(self, parent: str, container_id: str, resources: Json) -> None:
        """Change the limits to those of `linux.resources`. FailedPrecondition names what is refused."""
        self._write(cgroup_dir(parent, container_id, self._cgroups.driver), settings(resources, self._version))

    def _write(self, place: str, wanted: Sequence[Setting]) -> None:
        refused = [setting for setting in wanted if self._try(place, setting) is not None]
        # Memory with and without swap bound each other: which comes first depends on what was.
        for setting in refused:
            error = self._try(place, setting)
            if error is not None:
                msg = f"linux.resources: the kernel refuses {setting.value!r} for {setting.file}: {error.strerror}"
                raise FailedPrecondition(msg)

    def _try(self, place: str, setting: Setting) -> OSError | None:
        root = self._cgroups.host.controllers.get(setting.controller)
        if root is None:
            return FileNotFoundError(2, f"this node has no cgroup controller {setting.controller}")
        try:
            (root / place / setting.file).write_text(setting.value)
        except OSError as error:
            return error
        return None


def _enable_controllers(root: Path, place: str) -> None:
    """Hand the controllers down to the container's directory (cgroup v2, `cgroup.subtree_control`)."""
    at = root
    for part in Path(place).parts:
        # One that cannot be handed down is missed, by name, when its limit is written.
        with contextlib.suppress(OSError):
            for controller in (at / "cgroup.controllers").read_text().split():
                with contextlib.suppress(OSError):
                    (at / "cgroup.subtree_control").write_text(f"+{controller}")
        at /= part
        at.mkdir(exist_ok=True)


def _inherit_cpuset(root: Path, place: str) -> None:
    """On v1 a new directory has no CPUs, and takes no process."""
    at = root
    for part in Path(place).parts:
        above, at = at, at / part
        for file in _CPUSET:
            if not (at / file).read_text().strip():
                (at / file).write_text((above / file).read_text())
