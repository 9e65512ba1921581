"""Notices that a client leaves while nothing is read from it (epoll(7), EPOLLRDHUP).

asyncio forgets a connection whose reading is paused: without this a client that has sent more than its command takes
could go without anybody knowing. Invariant: each descriptor is told of once, and none is kept after its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable


class HangupWatch:
    """One epoll for all connections that are paused."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[], None]] = {}
        loop.add_reader(self._epoll.fileno(), self._look)

    def add(self, fd: int, tell: Callable[[], None]) -> None:
        """Call `tell` when the other side of `fd` has closed it."""
        self._told[fd] = tell
        self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def remove(self, fd: int) -> None:
        """The connection is read again, or closed."""
        self._told.pop(fd, None)
        with contextlib.suppress(OSError):  # closed: the kernel has taken it out
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Nobody is told any more."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _look(self) -> None:
        for fd, _ in self._epoll.poll(0):
            tell = self._told.get(fd)
            if tell is not None:
                tell()
