"""What a run can leave on a machine: processes, mounts, cgroups, network links.

Two questions: what belongs to one daemon (`traces_of`, by the directory that it was given), and what a whole test run
has left behind (`python -m tests.support.leftovers`, by comparing the machine before and after). It looks and names;
only `sweep` removes, and only what is attributed to one daemon. Invariant: nothing of others is ever attributed to us.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

RUN_VARIABLE = "CRI_SHIM_TEST_RUN"
"""In the environment of everything that a test run starts: the name of the run."""
DAEMON_VARIABLE = "CRI_SHIM_TEST_DAEMON"
"""In the environment of everything that one daemon starts: its base directory."""
CGROUP_PREFIX = "cri_shim_test_"
"""Each run puts its pods below `/<prefix><run>`. No dash: with systemd it would be a slice in slices."""

RUNTIME_PROGRAMS = frozenset({"conmon", "crun", "runc"})
"""Started with an environment of their own, maybe: known by the paths in their arguments."""

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """One process, with what tells whose it is."""

    pid: int
    started: int
    """Clock ticks since boot; with the pid it names the process for ever."""
    cmdline: str
    environ: str
    cgroups: str


@dataclass(frozen=True, slots=True)
class Traces:
    """What is there, one sentence per thing. Falsy when nothing is."""

    processes: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    links: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return any((self.processes, self.mounts, self.cgroups, self.links))

    def lines(self) -> list[str]:
        kinds = ("process", self.processes), ("mount", self.mounts), ("cgroup", self.cgroups), ("link", self.links)
        return [f"{kind} {thing}" for kind, things in kinds for thing in sorted(things)]


class Machine(msgspec.Struct, frozen=True):
    """A machine at one moment, as far as a run can change it."""

    processes: list[str]
    mounts: list[str]
    cgroups: list[str]
    links: list[str]


def traces_of(base: Path, cgroup_parent: str) -> Traces:
    """What belongs to the daemon in `base`, whose pods are below `cgroup_parent` (empty: it has no cgroups).

    Without `/sys/fs/cgroup` or as a plain user it sees as much as the kernel shows.
    """
    return Traces(
        frozenset(f"{p.pid} {p.cmdline}" for p in _processes_of(base, cgroup_parent)),
        frozenset(point for point in mount_points() if Path(point).is_relative_to(base)),
        frozenset(str(path) for path in _cgroups_below(cgroup_parent)),
    )


def sweep(base: Path, cgroup_parent: str) -> None:
    """Ends and removes all that `traces_of` names: the last resort after a test that failed."""
    for process in _processes_of(base, cgroup_parent):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while _processes_of(base, cgroup_parent) and time.monotonic() < deadline:
        time.sleep(0.05)
    # The last mount of a stack is on top of the others.
    for point in reversed([point for point in mount_points() if Path(point).is_relative_to(base)]):
        os.system(f"umount -l '{point}'")
    remove_cgroup(cgroup_parent)


def remove_cgroup(parent: str) -> None:
    """Removes `/parent` in every hierarchy; a cgroup that is in use stays."""
    if not parent:
        return
    for directory in [*_cgroups_below(parent), *(root / parent.strip("/") for root in _hierarchies())]:
        with contextlib.suppress(OSError):
            directory.rmdir()


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when it is gone or has only to be reaped."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def mount_points() -> list[str]:
    """The mount points of our mount namespace, in the order of mounting."""
    lines = (PROC / "self/mountinfo").read_text().splitlines()
    return [line.split()[4].encode().decode("unicode_escape") for line in lines]


def links() -> list[str]:
    """The network links of our network namespace. /sys would show those of the namespace that mounted it."""
    lines = (PROC / "self/net/dev").read_text().splitlines()
    return [line.partition(":")[0].strip() for line in lines[2:]]


def machine() -> Machine:
    return Machine(
        processes=[f"{p.pid} {p.started}" for p in _processes()],
        mounts=mount_points(),
        cgroups=[str(path) for root in _hierarchies() for path in _subdirectories(root)],
        links=links(),
    )


def left_since(before: Machine, run: str) -> Traces:
    """What the run called `run` has left. Things of other runs that began meanwhile are not counted."""
    now = machine()
    known = set(before.processes)
    marks = (f"{RUN_VARIABLE}={run}\0", f"/{CGROUP_PREFIX}{run}")
    ours = [
        p
        for p in _processes()
        if p.pid != os.getpid()
        and f"{p.pid} {p.started}" not in known
        and (marks[0] in p.environ or marks[1] in p.cgroups)
    ]
    cgroups = {path for path in set(now.cgroups) - set(before.cgroups) if _is_abandoned(Path(path), run)}
    return Traces(
        frozenset(f"{p.pid} {p.cmdline}" for p in ours),
        frozenset(now.mounts) - frozenset(before.mounts),
        frozenset(cgroups),
        frozenset(now.links) - frozenset(before.links),
    )


def _processes_of(base: Path, cgroup_parent: str) -> list[Process]:
    mark, path, cgroup = f"{DAEMON_VARIABLE}={base}\0", f"{base}/", f":{cgroup_parent}/"
    return [
        p
        for p in _processes()
        if mark in p.environ
        or (cgroup_parent and cgroup in p.cgroups)
        or (path in p.cmdline and p.cmdline.partition(" ")[0].rpartition("/")[2] in RUNTIME_PROGRAMS)
    ]


def _processes() -> Iterator[Process]:
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        # A process may go, or be somebody else's, at any of these reads.
        with contextlib.suppress(OSError):
            pid = int(entry.name)
            since = started(pid)
            if not since:
                continue
            yield Process(
                pid=pid,
                started=since,
                cmdline=_text(entry / "cmdline").replace("\0", " ").strip(),
                environ=_text(entry / "environ"),
                cgroups=_text(entry / "cgroup"),
            )


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def _hierarchies() -> list[Path]:
    """The roots of the cgroup hierarchies: one of v2, or one for each v1 controller.

    A directory where none is mounted is no hierarchy: crun writes into one called `unified`, and leaves it.
    """
    if (CGROUPS / "cgroup.procs").exists():
        return [CGROUPS]
    return [path for path in CGROUPS.iterdir() if path.is_mount()] if CGROUPS.exists() else []


def _subdirectories(root: Path) -> Iterator[Path]:
    """Every cgroup below `root`, the deepest first."""
    for directory, _, _ in os.walk(root, topdown=False):
        if directory != str(root):
            yield Path(directory)


def _cgroups_below(parent: str) -> list[Path]:
    """The cgroups below `/parent` in every hierarchy, without the parent itself: that is the caller's."""
    if not parent:
        return []
    return [path for root in _hierarchies() for path in _subdirectories(root / parent.strip("/"))]


def _is_abandoned(cgroup: Path, run: str) -> bool:
    """Whether a new cgroup is of this run, or of nobody: empty, and not of another run."""
    owners = [part for part in cgroup.parts if part.startswith(CGROUP_PREFIX)]
    if owners:
        return owners[0] == f"{CGROUP_PREFIX}{run}"
    try:
        return not any(_text(path / "cgroup.procs") for path in (cgroup, *_subdirectories(cgroup)))
    except FileNotFoundError:
        return False


def main(argv: list[str]) -> int:
    """`save FILE` before a run, `compare FILE RUN` after it: prints what was left and returns 1 if there is any."""
    match argv:
        case ["save", file]:
            Path(file).write_bytes(msgspec.json.encode(machine()))
            return 0
        case ["compare", file, run]:
            left = left_since(msgspec.json.decode(Path(file).read_bytes(), type=Machine), run)
            for line in left.lines():
                sys.stderr.write(f"left behind: {line}\n")
            return 1 if left else 0
        case _:
            sys.stderr.write("usage: python -m tests.support.leftovers save FILE | compare FILE RUN\n")
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
