"""A thread that looks, every now and then, whether others get on.

Not what it looks at. Invariant: it sleeps while there is nothing to look at.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable


class HangWatch:
    """`look` says in how many seconds it is to be called again; None = when `wake` is."""

    def __init__(self, look: Callable[[], float | None]) -> None:
        self._look = look
        self._asleep = _thread.allocate_lock()
        self._asleep.acquire()
        self._waking = _thread.allocate_lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="log-watch", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to look at. Any thread."""
        if self._waking.acquire(blocking=False):
            self._asleep.release()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self.wake()
        self._thread.join()

    def _run(self) -> None:
        pause: float | None = None
        while not self._closed:
            if self._asleep.acquire(timeout=-1 if pause is None else pause):
                self._waking.release()
            pause = self._look()
