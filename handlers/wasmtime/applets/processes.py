"""What the processes of a container use, by the host's /proc: read before an applet leaves that behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from handlers.wasmtime.applets.facts import Facts, Process

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_SECOND: Final = 1_000_000_000
# Of proc(5): fields of /proc/PID/stat, counted after the name, and of statm.
_USER_TICKS, _SYSTEM_TICKS = 11, 12
_RESIDENT: Final = 1


def measured(facts: Facts) -> Facts:
    """With what those processes use that have one of their own; while the host's /proc can be seen."""
    processes = tuple(_measured(process) if process.proc else process for process in facts.processes)
    return msgspec.structs.replace(facts, processes=tuple(process for process in processes if process is not None))


def _measured(process: Process) -> Process | None:
    directory = Path("/proc") / process.proc
    try:
        numbers = (directory / "stat").read_bytes().rpartition(b")")[2].split()
        pages = int((directory / "statm").read_bytes().split()[_RESIDENT])
    except OSError:
        return None  # it has ended meanwhile
    ticks = int(numbers[_USER_TICKS]) + int(numbers[_SYSTEM_TICKS])
    return msgspec.structs.replace(process, cpu_ns=ticks * _SECOND // _TICKS, memory=pages * _PAGE)
