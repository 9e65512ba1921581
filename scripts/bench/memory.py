"""Memory of processes as the kernel shares it out: PSS, from /proc/PID/smaps_rollup.

Invariant: a process that goes while it is looked at counts as nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
KIB_PER_MIB = 1024


@dataclass(frozen=True, slots=True)
class Process:
    """One process and its place in the tree."""

    pid: int
    parent: int
    cmdline: str


@dataclass(frozen=True, slots=True)
class Processes:
    """All processes of the machine at one moment."""

    by_pid: dict[int, Process]

    @classmethod
    def now(cls) -> Processes:
        found: dict[int, Process] = {}
        for entry in PROC.iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    cmdline = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                    found[int(entry.name)] = Process(int(entry.name), int(fields[1]), cmdline)
        return cls(found)

    def children(self, pid: int) -> set[int]:
        return {p.pid for p in self.by_pid.values() if p.parent == pid}

    def tree(self, pids: Iterable[int]) -> set[int]:
        """The processes and all their descendants."""
        known: set[int] = set()
        fresh = set(pids) & self.by_pid.keys()
        while fresh:
            known |= fresh
            fresh = {child for pid in fresh for child in self.children(pid)} - known
        return known

    def naming(self, ids: Collection[str]) -> set[int]:
        """The processes that have one of the ids in their arguments."""
        return {p.pid for p in self.by_pid.values() if any(name in p.cmdline for name in ids)}


def resident(daemon: int, ids: Collection[str]) -> set[int]:
    """What always runs: the daemon and those of its children that serve no pod or container of `ids`."""
    processes = Processes.now()
    return ({daemon} | processes.children(daemon)) - processes.naming(ids)


def helpers(ids: Collection[str], payload: Collection[int]) -> set[int]:
    """What runs because of the pods and containers of `ids`, without the containers' own processes."""
    processes = Processes.now()
    return processes.tree(processes.naming(ids)) - processes.tree(payload)


def pss(pids: Iterable[int]) -> float:
    """Their proportional set size together, in MiB. PermissionError for a process of somebody else."""
    kib = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kib += int(line.split()[1])
    return kib / KIB_PER_MIB
