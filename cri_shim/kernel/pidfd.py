"""pidfd_open(2) and pidfd_send_signal(2). Not for waiting: `cri_shim.kernel.process.Child` does that."""

from __future__ import annotations

import contextlib
import os
import signal


def open_pidfd(pid: int) -> int:
    """A descriptor of the process; a zombie still has one. ProcessLookupError when there is no such process."""
    return os.pidfd_open(pid)


def send_signal(pidfd: int, number: int) -> None:
    """Signal the process; one that is gone already is success."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)
