"""How often a guest may call into Python for nothing: calls that neither move bytes nor wait.

Python runs one thread at a time. A guest that only asks, again and again, takes turns from the daemon's loop; a hundred
of them would leave it none. So what a guest asks beyond its allowance it asks after a rest, the longer the more guests
do so. Calls that did something are as many as there is traffic, and earn others. For one guest's thread; the number of
those who rest is of the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_RATE: Final = 1000.0
"""Calls a second, each of some 15 µs."""
_BURST: Final = 200.0
_EARNED: Final = 8.0
"""By a useful call: a server asks what there is to do, and tries to read once more than there is."""
_REST: Final = 0.001
"""Seconds; so long for the first `_TOGETHER` guests, and longer for more."""
_TOGETHER: Final = 2

_resting = 0
"""Guests that rest now. Changed by one thread at a time, as all of Python; a lost count would only shorten a rest."""


class Turns:
    """`sleep` waits and says whether the guest is to stop."""

    def __init__(self, sleep: Callable[[float], bool]) -> None:
        self._sleep = sleep
        self._left = _BURST
        self._at = time.monotonic()

    def called(self, *, useful: bool) -> bool:
        """Rests if there have been too many that were not; True when the guest is to stop."""
        global _resting  # noqa: PLW0603  see there
        if useful:
            self._left = min(_BURST, self._left + _EARNED)
            return False
        now = time.monotonic()
        self._left = min(_BURST, self._left + (now - self._at) * _RATE) - 1
        self._at = now
        if self._left >= 0:
            return False
        _resting += 1
        try:
            return self._sleep(_REST * max(1.0, _resting / _TOGETHER))
        finally:
            _resting -= 1
            self._at = time.monotonic()  # a rest earns nothing
