"""Whether a guest is to stop, for the one thread that may wait for it: the guest's own.

Not `threading.Event`, which runs ten functions where this runs two: of each a worker has a copy of its own in memory.
Invariant: once it is set it stays so.
"""

from __future__ import annotations

import _thread


class Stopping:
    """`wait` is for one thread, all else for any."""

    def __init__(self) -> None:
        self._held = _thread.allocate_lock()
        self._held.acquire()
        self._setting = _thread.allocate_lock()
        self.is_set = False

    def set(self) -> None:
        """From now on nothing waits."""
        if self._setting.acquire(blocking=False):  # and it stays held: there is one release
            self.is_set = True
            self._held.release()

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; whether it is set. `seconds` is positive."""
        if self.is_set:
            return True
        if self._held.acquire(timeout=seconds):
            self._held.release()
        return self.is_set
