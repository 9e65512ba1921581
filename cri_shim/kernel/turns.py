"""The daemon's event loop: asyncio's own, with short turns.

Not for what blocks (that belongs into threads). Invariant: between two looks at what is due and at what is ready, the
loop deals with at most EVENTS descriptors, however many are ready; and each gets its turn before one gets its second.
Where it has work in hand it looks for more once in LOOK, not after each step: a look gives the interpreter's lock away.
"""

# mypy: disable-error-code="explicit-override"
from __future__ import annotations

import asyncio
import math
import select
import selectors
import time
from typing import Final

EVENTS: Final = 4
"""A piece of a stream or the beginning of a session takes 0.1 to 0.3 ms; a look at the descriptors a hundredth."""

LOOK: Final = 0.0002
"""Seconds."""


class ShortTurns(selectors.EpollSelector):
    """epoll(7) that gives out a few descriptors at a time: the kernel moves those to the end of its list."""

    _selector: select.epoll
    """The base class's; it has no public name."""
    _next_look = 0.0
    """When there may be something that the last look did not give out."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As the selector of the standard library does it, but for the number."""
        if timeout is not None and timeout <= 0 and time.monotonic() < self._next_look:
            return []
        # Rounded up, as epoll counts in milliseconds: what is due must not be looked for too early.
        seconds = -1 if timeout is None else max(0.0, math.ceil(timeout * 1e3) * 1e-3)
        try:
            found = self._selector.poll(seconds, EVENTS)
        except InterruptedError:
            return []
        self._next_look = time.monotonic() + LOOK if len(found) < EVENTS else 0.0
        keys = self.get_map()
        return [(key, _kinds(events) & key.events) for fd, events in found if (key := keys.get(fd)) is not None]


def _kinds(events: int) -> int:
    """An error or a hang-up is news for who reads and for who writes."""
    readable = selectors.EVENT_READ if events & ~select.EPOLLOUT else 0
    writable = selectors.EVENT_WRITE if events & ~select.EPOLLIN else 0
    return readable | writable


def new_loop() -> asyncio.AbstractEventLoop:
    """For `asyncio.Runner`."""
    return asyncio.SelectorEventLoop(ShortTurns())
