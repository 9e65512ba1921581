"""The cgroup of a container that is one process of ours: make it with its limits, place the process, change the limits.

Not for what an OCI runtime runs, which makes its own, and not for killing and removing (`cri_shim.adapters.cgroups`).
With the systemd driver the cgroup is a scope, which begins with a process and goes with the last one. Everything blocks
and belongs into a thread. Invariant: a process runs nothing of a container's before the limits hold for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from cri_shim.adapters.cgroups import Cgroups, Version, comes_into
from cri_shim.kernel import systemd
from cri_shim.model.errors import FailedPrecondition
from cri_shim.spec.cgroup_limits import Setting, settings
from cri_shim.spec.cgroup_plan import Driver, cgroup_dir, container_scope
from cri_shim.spec.facts import Json
from cri_shim.spec.scope_limits import Value, scope_limits

_CPUSET: Final = ("cpuset.cpus", "cpuset.mems")
_DELEGATED: Final = {"Delegate": True}
"""All controllers are there, and further processes may be moved in."""


class ProcessCgroups:
    """All by the parent that the kubelet names, and the container's id."""

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        self._version = 2 if cgroups.host.version is Version.V2 else 1
        # On a hybrid host nothing is limited in the unified hierarchy, where it stays, as a conmon does.
        hierarchies = cgroups.host.hierarchies
        self._roots = [root for root in hierarchies if self._version > 1 or root != cgroups.host.unified]

    def enter(self, pid: int, parent: str, container_id: str, resources: Json) -> None:
        """`make`, and move a process of one thread in if it is not."""
        self.make(pid, parent, container_id, resources)
        if self.doors(parent, container_id):
            self.join(pid, parent, container_id)

    def doors(self, parent: str, container_id: str) -> list[str]:
        """To each of these files a process of one thread writes "0" after `make`, and has moved itself in.

        None = `make` has moved it. Who is moved by another, or with all threads that he may have, has the kernel wait
        until no CPU is in the middle of a fork: 10 ms where nobody has been moved lately (cgroup_procs_write_start).
        """
        if self._version > 1:
            return []
        place = cgroup_dir(parent, container_id, self._cgroups.driver)
        return [str(root / place / "tasks") for root in self._roots]

    def make(self, pid: int, parent: str, container_id: str, resources: Json) -> None:
        """Make the cgroup with the limits of `linux.resources` (OCI), for a process that moves in by `doors`.

        FailedPrecondition names what is refused, OSError says what failed. What was made stays then:
        `Cgroups.remove` takes it away.
        """
        place = cgroup_dir(parent, container_id, self._cgroups.driver)
        wanted = settings(resources, self._version)
        if self._cgroups.driver is Driver.SYSTEMD:
            self._start_scope(pid, parent, container_id, wanted)
        for root in self._roots:
            if self._version > 1 and self._cgroups.driver is Driver.CGROUPFS:
                _enable_controllers(root, place)
            (root / place).mkdir(parents=True, exist_ok=True)
        if self._version == 1 and "cpuset" in self._cgroups.host.controllers:
            _inherit_cpuset(self._cgroups.host.controllers["cpuset"], place)
        self._write(place, wanted)
        if self._version > 1:
            self._move(pid, place)

    def join(self, pid: int, parent: str, container_id: str) -> None:
        """Move a further process of one thread in. OSError."""
        self._move(pid, cgroup_dir(parent, container_id, self._cgroups.driver))

    def limit(self, parent: str, container_id: str, resources: Json) -> None:
        """Change the limits to those of `linux.resources`. FailedPrecondition names what is refused."""
        place = cgroup_dir(parent, container_id, self._cgroups.driver)
        wanted = settings(resources, self._version)
        if resources.get("memory", {}).get("checkBeforeUpdate") and self._version > 1:
            self._check_room(place, wanted)
        self._write(place, wanted)
        if self._cgroups.driver is Driver.SYSTEMD and (limits := self._properties(wanted)):
            _, scope = container_scope(parent, container_id)
            try:
                systemd.set_properties(scope, limits)
            except OSError as error:
                msg = f"linux.resources: {error}"
                raise FailedPrecondition(msg) from error

    def _start_scope(self, pid: int, parent: str, container_id: str, wanted: Sequence[Setting]) -> None:
        slice_name, scope = container_scope(parent, container_id)
        properties = {**_DELEGATED, **self._properties(wanted)}
        try:
            systemd.start_scope(scope, pid, slice_name, description="Wasm worker of a container", properties=properties)
        except OSError as error:
            msg = f"cannot make the cgroup of the container: {error}"
            raise FailedPrecondition(msg) from error
        if not comes_into(pid, cgroup_dir(parent, container_id, Driver.SYSTEMD)):
            msg = f"systemd did not move the process into {scope}"
            raise FailedPrecondition(msg)

    def _properties(self, wanted: Sequence[Setting]) -> Mapping[str, Value]:
        return scope_limits(wanted) if self._version > 1 else {}

    def _move(self, pid: int, place: str) -> None:
        for root in self._roots:
            (root / place / "cgroup.procs").write_text(str(pid))

    def _check_room(self, place: str, wanted: Sequence[Setting]) -> None:
        """On v2 the kernel would kill for room; on v1 it refuses by itself."""
        limit = next((setting.value for setting in wanted if setting.file == "memory.max"), "max")
        used = (self._cgroups.host.controllers["memory"] / place / "memory.current").read_text()
        if limit != "max" and int(used) > int(limit):
            msg = f"linux.resources.memory_limit_in_bytes: {limit} is less than the {used.strip()} bytes in use"
            raise FailedPrecondition(msg)

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
