"""The short-lived children of an earlier daemon: runtime calls, CNI plugins, unpackers, compilers.

A killed daemon's children go on, and a CNI ADD that ends after recovery's DEL would leak. Each of them holds an
inherited lock on one file. Invariant: after `end_leftovers` nobody but this daemon holds it. Blocking, for a thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from cri_shim.kernel import fs
from cri_shim.model.errors import FailedPrecondition

PATIENCE_SECONDS = 5.0
KILL_SECONDS = 5.0
_POLL_SECONDS = 0.02


def end_leftovers(lock: Path) -> int:
    """Wait for what is in flight, kill what takes too long; the held lock's descriptor, for this daemon's children."""
    for seconds in (PATIENCE_SECONDS, KILL_SECONDS):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fd = fs.lock_exclusive(lock)
            if fd is not None:
                return fd
            time.sleep(_POLL_SECONDS)
        for pid in _holders(lock):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    msg = f"processes of an earlier daemon still hold {lock} and cannot be killed: {_holders(lock)}"
    raise FailedPrecondition(msg, hint="they may be stuck in the kernel; look at their stacks")


def _holders(lock: Path) -> list[int]:
    """Processes that have the file open, found in /proc/PID/fd."""
    try:
        wanted = lock.stat()
    except FileNotFoundError:
        return []
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _has_open(entry, wanted)]


def _has_open(process: Path, wanted: os.stat_result) -> bool:
    if int(process.name) == os.getpid():
        return False
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(descriptor.stat(), wanted):
                    return True
    return False
