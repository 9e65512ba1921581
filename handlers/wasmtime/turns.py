"""How often a guest may call into Python for nothing: calls that neither move bytes nor wait.

Python runs one thread at a time. A guest that only asks, again and again, takes turns from the daemon's loop; a hundred
of them would leave it none. So what a guest asks beyond its allowance it asks after a rest. Calls that did something
are as many as there is traffic, and earn others; so does computing. Waiting for a turn costs some, and who was late for
one after a rest rests longer the next time: a hundred that wait for theirs would otherwise never come to rest. For one
guest's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_RATE: Final = 1000.0
"""Calls for a second of computing, each of some 15 µs; as many less for one of waiting."""
_BURST: Final = 200.0
_EARNED: Final = 8.0
"""By a useful call: a server asks what there is to do, and tries to read once more than there is."""
_REST: Final = 0.001
_LONGEST: Final = 0.064
"""Seconds, the first and the longest rest."""
_LATE: Final = 0.0005
"""Seconds after a rest, from which on others had to be waited for."""
_SHORTER: Final = 0.98


class Turns:
    """`sleep` waits and says whether the guest is to stop."""

    def __init__(self, sleep: Callable[[float], bool]) -> None:
        self._sleep = sleep
        self._left = _BURST
        self._rest = _REST
        self._at = self._spent = -1.0
        """When the last call was, and the CPU time at it, in seconds. Unknown so far: this is another thread."""

    def called(self, *, useful: bool) -> bool:
        """Rests if there have been too many that were not; True when the guest is to stop."""
        at, spent = time.monotonic(), time.thread_time()
        computed, passed = (spent - self._spent, at - self._at) if self._at >= 0 else (0.0, 0.0)
        self._at, self._spent = at, spent
        if useful:
            self._left = min(_BURST, self._left + _EARNED)
            return False
        waited = passed - computed
        self._left = max(-1.0, min(_BURST, self._left + (computed - waited) * _RATE) - 1)
        return self._left < 0 and self._take_rest()

    def _take_rest(self) -> bool:
        is_to_stop = self._sleep(self._rest)
        now = time.monotonic()
        if now - self._at - self._rest > _LATE:
            self._rest = min(self._rest * 2, _LONGEST)
        else:
            self._rest = max(self._rest * _SHORTER, _REST)
        self._at = now
        return is_to_stop
