"""The daemon's threads before all others that compete with it for the CPU: nice values (sched(7)).

Not for guests (`cri_shim.adapters.thread_group`). Invariants: no process, and no thread of a guest, inherits any of it;
where the daemon may not (CAP_SYS_NICE, RLIMIT_NICE) nothing fails, and it is one among its equals.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Final

_KEEN: Final = -10

_is_favoured = False


def favour_all() -> None:
    """Let all threads that there are come first, those of libraries too: an answer waits for each that it passes.

    What libraries start later inherits it (gRPC's threads start no processes); what Python starts is as ever, unless
    it says `favour`. Blocks for a fraction of a millisecond.
    """
    global _is_favoured  # noqa: PLW0603  of the process
    _is_favoured = True
    ours = {thread.native_id for thread in threading.enumerate()}
    for entry in os.listdir("/proc/self/task"):  # noqa: PTH208  no Path objects
        _favour(int(entry), os.SCHED_RESET_ON_FORK if int(entry) in ours else 0)
    with contextlib.suppress(OSError):  # the kernel has none, or the daemon may not
        # Where each session has a group of its own (sched(7), autogroup), nice values count within that only.
        Path("/proc/self/autogroup").write_text(str(_KEEN))


def favour() -> None:
    """The same for the calling thread, which is new. Nothing before `favour_all`."""
    if _is_favoured:
        _favour(0, os.SCHED_RESET_ON_FORK)


def _favour(thread: int, flags: int) -> None:
    with contextlib.suppress(OSError):  # it may not, or the thread has ended
        os.sched_setscheduler(thread, os.SCHED_OTHER | flags, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, thread, _KEEN)
