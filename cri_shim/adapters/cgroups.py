"""The containers' cgroups on v1, v2 and hybrid hosts: place a monitor, kill, remove, read.

Not for limits: the OCI runtime writes them, but for one that it may not be able to. Everything blocks and belongs into
a thread. Invariant: only the directory of one container, and that of its monitor, is ever changed, removed or killed;
their parent belongs to the kubelet.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cri_shim.kernel import mounts, systemd
from cri_shim.spec.cgroup_plan import Driver, cgroup_dir, monitor_dir, monitor_scope
from cri_shim.spec.update import CpuSet

_ROOT: Final = Path("/sys/fs/cgroup")
_ACCOUNTED: Final = ("memory", "pids", "cpu", "cpuacct", "blkio")
"""v1 controllers that a monitor moves in; not cpuset, where a new directory takes no process before it is set up."""
_UNLIMITED: Final = 1 << 62
"""v1 writes an unlimited memory.limit_in_bytes as the largest page-aligned 63-bit number."""
_EVENTS: Final = "memory.events"
_KILL_SECONDS: Final = 10.0
_BUSY_SECONDS: Final = 5.0
_SCOPE_SECONDS: Final = 5.0
_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.01


class Version(enum.Enum):
    """Which cgroup hierarchies a host has; on a hybrid one the v1 controllers are used."""

    V1 = "v1"
    V2 = "v2"
    HYBRID = "hybrid"


@dataclass(frozen=True, slots=True)
class CgroupHost:
    """The mounted hierarchies.

    `controllers` maps a controller to the root of its hierarchy, `hierarchies` are all roots without repeats
    (co-mounted controllers share one; named ones and the unified one are included).
    """

    version: Version
    controllers: Mapping[str, Path]
    hierarchies: tuple[Path, ...]
    unified: Path | None


def host_from_mounts(root: Path, table: Sequence[mounts.MountEntry]) -> CgroupHost:
    """What is mounted at and below `root`, by the mount table."""
    here = [entry for entry in table if entry.target.is_relative_to(root)]
    unified = next((entry.target for entry in here if entry.fstype == "cgroup2"), None)
    legacy = {entry.target: entry for entry in here if entry.fstype == "cgroup"}
    controllers = {name: entry.target for entry in legacy.values() for name in _v1_controllers(entry)}
    roots = (*legacy, *([unified] if unified else []))
    if not legacy:
        return CgroupHost(Version.V2, controllers, roots, unified)
    return CgroupHost(Version.HYBRID if unified else Version.V1, controllers, roots, unified)


def _v1_controllers(entry: mounts.MountEntry) -> Iterator[str]:
    for option in entry.super_options:
        if "=" not in option and option not in {"rw", "ro", "xattr", "noprefix", "clone_children"}:
            yield option


class Cgroups:
    """The cgroups of the containers below the parents that the kubelet names."""

    def __init__(self, host: CgroupHost, driver: Driver) -> None:
        self.host = host
        self.driver = driver
        self._lock = threading.Lock()
        self._told: dict[int, int] = {}

    @staticmethod
    def detect(root: Path = _ROOT) -> CgroupHost:
        """Look at what is mounted. A host without any cgroup mount looks like v2 without controllers."""
        host = host_from_mounts(root, mounts.mountinfo())
        if host.version is not Version.V2 or host.unified is None:
            return host
        names = (host.unified / "cgroup.controllers").read_text().split()
        return CgroupHost(host.version, dict.fromkeys(names, host.unified), host.hierarchies, host.unified)

    def place_monitor(self, pid: int, parent: str, container_id: str) -> str:
        """Move a conmon out of the daemon's cgroup; where it went, relative to the hierarchies.

        Its own directory below `parent`, or a scope of its own; else `monitors` below the daemon's; else it stays.
        Never fails: a monitor in the wrong place is better than no container.
        """
        own = self._own_paths()
        stays = next(iter(own.values()), "")
        with contextlib.suppress(OSError):
            wanted = monitor_dir(parent, container_id, self.driver)
            if self.driver is Driver.CGROUPFS:
                self._move(pid, dict.fromkeys(own, wanted))
                return wanted
            slice_name, scope = monitor_scope(parent, container_id)
            systemd.start_scope(scope, pid, slice_name, description="conmon of a container")
            if comes_into(pid, wanted):
                return wanted
        with contextlib.suppress(OSError):
            self._move(pid, {root: f"{path}/monitors".lstrip("/") for root, path in own.items()})
            return f"{stays}/monitors".lstrip("/")
        return stays

    def _own_paths(self) -> dict[Path, str]:
        """The daemon's own cgroup in each hierarchy that a monitor moves in."""
        own, host = own_cgroups(), self.host
        if host.version is Version.V2:
            return {host.unified: own[""]} if host.unified is not None and "" in own else {}
        return {host.controllers[name]: own[name] for name in _ACCOUNTED if name in own and name in host.controllers}

    @staticmethod
    def _move(pid: int, places: Mapping[Path, str]) -> None:
        for root, place in places.items():
            (root / place).mkdir(parents=True, exist_ok=True)
        for root, place in places.items():
            (root / place / "cgroup.procs").write_text(str(pid))

    def kill_all(self, parent: str, container_id: str) -> bool:
        """SIGKILL everything in the container's cgroup, sub-cgroups too; whether it is empty now. Bounded to 10 s."""
        place = cgroup_dir(parent, container_id, self.driver)
        return _until(lambda: self._kill_once(place), _KILL_SECONDS)

    def _kill_once(self, place: str) -> bool:
        with contextlib.suppress(OSError):  # before Linux 5.14 there is no such file: the signals below do it
            if self.host.unified is not None:
                (self.host.unified / place / "cgroup.kill").write_text("1")
        if freezer := self.host.controllers.get("freezer"):
            for directory in _subtree(freezer / place):
                with contextlib.suppress(OSError):  # v1: a frozen process does not die
                    (directory / "freezer.state").write_text("THAWED")
        alive = self._processes(place)
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not alive

    def remove(self, parent: str, container_id: str) -> None:
        """Remove the directories of the container and of its monitor from every hierarchy; gone is success.

        Kills nothing. OSError EBUSY when there are processes in it after 5 s.
        """
        left = [
            root / place
            for place in (
                cgroup_dir(parent, container_id, self.driver),
                monitor_dir(parent, container_id, self.driver),
            )
            for root in self.host.hierarchies
        ]

        def try_all() -> bool:
            left[:] = [directory for directory in left if not _removed(directory)]
            return not left

        if not _until(try_all, _BUSY_SECONDS):
            raise OSError(errno.EBUSY, "cgroup still has processes", os.fspath(left[0]))

    def processes(self, parent: str, container_id: str) -> list[int]:
        """The pids in the container's cgroup and below, ascending; none when it is gone."""
        return sorted(self._processes(cgroup_dir(parent, container_id, self.driver)))

    def _processes(self, place: str) -> set[int]:
        found: set[int] = set()
        for root in self.host.hierarchies:
            for directory in _subtree(root / place):
                with contextlib.suppress(OSError):
                    found.update(map(int, (directory / "cgroup.procs").read_text().split()))
        return found - {0, os.getpid()}  # 0 is a process of another PID namespace

    def inherited_cpuset(self, parent: str, container_id: str) -> CpuSet:
        """The CPUs and memory nodes of the container's parent."""
        root = self.host.controllers.get("cpuset")
        if root is None:
            return CpuSet("", "")
        above = (root / cgroup_dir(parent, container_id, self.driver)).parent
        suffix = ".effective" if self.host.version is Version.V2 else ""
        cpus, mems = (_read_if_there(above / f"cpuset.{what}{suffix}").strip() for what in ("cpus", "mems"))
        return CpuSet(cpus, mems)

    def accounts_for_swap(self) -> bool:
        """Whether a container's swap can be limited."""
        memory = self.host.controllers.get("memory")
        if memory is None:
            return False
        if self.host.version is Version.V2:
            return Path("/proc/swaps").exists()  # the root cgroup has no memory.swap.max to look at
        return (memory / "memory.memsw.limit_in_bytes").exists()

    def lift_cpu_quota(self, parent: str, container_id: str) -> None:
        """What a runtime does for `cpu.quota` -1, for one that cannot. OSError when the kernel refuses."""
        file, value = ("cpu.max", "max") if self.host.version is Version.V2 else ("cpu.cfs_quota_us", "-1")
        (self.host.controllers["cpu"] / cgroup_dir(parent, container_id, self.driver) / file).write_text(value)

    def memory_limit(self, parent: str, container_id: str) -> int | None:
        """The container's memory limit in bytes; None when there is none."""
        file = "memory.max" if self.host.version is Version.V2 else "memory.limit_in_bytes"
        text = self._read_memory(parent, container_id, file).strip()
        return int(text) if text.isdigit() and int(text) < _UNLIMITED else None

    def oom_kills(self, parent: str, container_id: str) -> int:
        """How many of the container's processes the kernel's OOM killer has ended; 0 when the cgroup is gone."""
        file = _EVENTS if self.host.version is Version.V2 else "memory.oom_control"
        return _oom_kills(self._read_memory(parent, container_id, file))

    def unclaimed_oom_kills(self, parent: str, container_id: str) -> int:
        """Kills below the container's parent that no other cgroup there accounts for; 0 on v1, which has no sum.

        They were in the container's own cgroup, or in such that are gone: systemd removes a scope, and the counter in
        it, with the last process.
        """
        own = self._memory_dir(parent, container_id)
        if own is None or self.host.version is not Version.V2:
            return 0
        # The root has no such file: nothing is known there.
        while total := _oom_kills(_read_if_there(own.parent / _EVENTS)):
            others = [file for file in own.parent.glob(f"*/{_EVENTS}") if file.parent != own]
            claimed = sum(_oom_kills(_read_if_there(file)) for file in others)
            if _oom_kills(_read_if_there(own.parent / _EVENTS)) == total:  # no kill while the others were read
                return total - claimed
        return 0

    def oom_killed_since(self, parent: str, container_id: str, before: int) -> bool:
        """Whether there are more unclaimed kills than `before`, and than an earlier call was told; or any in its own.

        To be called once at every end of a container: so a kill counts for one of them at most. On v1 its own counter
        is all there is, and gone when systemd was quicker to remove the scope.
        """
        own = self._memory_dir(parent, container_id)
        with self._lock, contextlib.suppress(FileNotFoundError):
            now = self.unclaimed_oom_kills(parent, container_id)
            if own is not None and now > before:
                above = own.parent.stat().st_ino  # not by name: one that is made again counts from 0
                told = self._told.get(above, 0)
                self._told[above] = max(told, now)
                if now > told:
                    return True
        return bool(self.oom_kills(parent, container_id))

    def _memory_dir(self, parent: str, container_id: str) -> Path | None:
        root = self.host.controllers.get("memory")
        return None if root is None else root / cgroup_dir(parent, container_id, self.driver)

    def _read_memory(self, parent: str, container_id: str, file: str) -> str:
        directory = self._memory_dir(parent, container_id)
        return "" if directory is None else _read_if_there(directory / file)


def own_cgroups() -> dict[str, str]:
    """The cgroup of this process by controller, relative to the root of its hierarchy (cgroups(7), /proc/self/cgroup).

    That of cgroup v2 has no controller's name: "".
    """
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    return {name: path.strip("/") for _, names, path in lines for name in names.split(",")}


def comes_into(pid: int, place: str) -> bool:
    """Wait until systemd has moved a process; False when it has not within 5 s."""
    return _until(lambda: f"/{place}\n" in _read_if_there(Path(f"/proc/{pid}/cgroup")), _SCOPE_SECONDS)


def _oom_kills(events: str) -> int:
    """From memory.events, or memory.oom_control of v1."""
    lines = (line.split() for line in events.splitlines())
    return next((int(words[1]) for words in lines if words[0] == "oom_kill"), 0)


def _read_if_there(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _subtree(directory: Path) -> list[Path]:
    """The directory and all below it, children before parents; empty when it is gone."""
    return [Path(path) for path, _, _ in os.walk(directory, topdown=False)]


def _removed(directory: Path) -> bool:
    for below in _subtree(directory):
        try:
            below.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in {errno.EBUSY, errno.ENOTEMPTY}:
                raise
            return False
    return True


def _until(attempt: Callable[[], bool], seconds: float) -> bool:
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while not attempt():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True
