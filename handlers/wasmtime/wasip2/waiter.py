"""The one place where a component of ours waits.

Not what is waited for: sockets, streams and clocks give a `Source`. Invariant: every wait ends when the guest is told
to stop, or the client that it works for has gone, whatever else it waits for.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from handlers.wasmtime.sockets import Stopped

_LONGEST_MS: Final = 3_600_000.0
_UNASKED: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL
_GONE: Final = select.POLLHUP | select.POLLERR


@dataclass(frozen=True, slots=True)
class Interest:
    """What ends a wait: one of the descriptors with its poll(2) events, or a time (monotonic, ns)."""

    fds: tuple[tuple[int, int], ...] = ()
    deadline: int | None = None
    ready: bool = False
    """There is nothing to wait for."""


READY: Final = Interest(ready=True)
NEVER: Final = Interest()


class Source:
    """Something to wait for."""

    def interest(self) -> Interest:
        """Asked before every wait."""
        raise NotImplementedError

    def settle(self) -> bool:
        """A descriptor is ready, or the time has come: whether that is all it takes."""
        return True


class Always(Source):
    """Ready."""

    def interest(self) -> Interest:
        """`Source`."""
        return READY


@dataclass(frozen=True, slots=True)
class FdSource(Source):
    """A descriptor with poll(2) events."""

    fd: int
    events: int

    def interest(self) -> Interest:
        """`Source`."""
        return Interest(((self.fd, self.events),))


@dataclass(frozen=True, slots=True)
class Timer(Source):
    """A time, monotonic in ns."""

    deadline: int

    def interest(self) -> Interest:
        """`Source`."""
        return Interest(deadline=self.deadline)


class Left(Stopped):
    """Who the guest works for has gone: it ends, and nobody else does."""


class Client(Protocol):
    """Who the guest works for."""

    is_wanted: bool
    """False: it has gone."""

    def await_guest(self) -> int:
        """The guest is about to wait. The descriptor whose hang-up means that the client has gone."""
        ...


class _Served(threading.local):
    """Each thread's own."""

    client: Client | None = None


class Waiter:
    """For the guest's threads; `stop` is for any. `resting` is entered by one that waits: it uses no CPU then."""

    def __init__(self, resting: Callable[[], AbstractContextManager[None]]) -> None:
        self._resting = resting
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._lock = threading.Lock()
        self._served = _Served()

    def stop(self) -> None:
        """End every wait, now and from now on. Any thread; closed already is success."""
        with self._lock:
            self._stopping = True
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """There will be no more waits."""
        with self._lock:
            wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)

    def serve(self, client: Client | None) -> None:
        """From now on the calling thread works for this client: its waits end by `Left` when that has gone."""
        self._served.client = client

    def wait(self, sources: Sequence[Source]) -> list[int]:
        """Wait until one of them is ready: the indices of all that are. Stopped when the guest is to stop."""
        while True:
            ready = self._once(sources, blocking=True)
            if ready:
                return ready

    def look(self, sources: Sequence[Source]) -> list[int]:
        """The same without waiting: it may be none."""
        return self._once(sources, blocking=False)

    def _once(self, sources: Sequence[Source], *, blocking: bool) -> list[int]:
        if self._stopping:
            raise Stopped
        interests = [source.interest() for source in sources]
        ready = [index for index, interest in enumerate(interests) if interest.ready]
        deadlines = [interest.deadline for interest in interests if interest.deadline is not None]
        waits = blocking and not ready
        happened = self._poll(interests, _milliseconds(deadlines) if waits else 0)
        now = time.monotonic_ns() if deadlines else 0
        for index, interest in enumerate(interests):
            due = interest.deadline is not None and interest.deadline <= now
            if not interest.ready and (due or _has_any(interest, happened)) and sources[index].settle():
                ready.append(index)
        ready.sort()
        return ready

    def _poll(self, interests: Sequence[Interest], milliseconds: float | None) -> dict[int, int]:
        watched: dict[int, int] = {}
        for interest in interests:
            for fd, events in interest.fds:
                watched[fd] = watched.get(fd, 0) | events
        if not watched and milliseconds == 0:
            return {}
        client = self._served.client
        line = client.await_guest() if client is not None else -1
        if client is not None:
            watched.setdefault(line, 0)
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        for fd, events in watched.items():
            poller.register(fd, events)
        happened = poller.poll(0)
        if not happened and milliseconds != 0:
            with self._resting():
                happened = poller.poll(milliseconds)
        if self._stopping:
            raise Stopped
        found = dict(happened)
        if client is not None and found.get(line, 0) & _GONE:
            client.is_wanted = False
            raise Left
        return found


def _milliseconds(deadlines: Sequence[int]) -> float | None:
    """Until the first of them; poll(2) rounds up, so that it never comes back before the time."""
    if not deadlines:
        return None
    return min(max(0, min(deadlines) - time.monotonic_ns()) / 1e6, _LONGEST_MS)


def _has_any(interest: Interest, happened: dict[int, int]) -> bool:
    # Errors and hang-ups come unasked, and are for everybody who watches the descriptor.
    return any(happened.get(fd, 0) & (events | _UNASKED) for fd, events in interest.fds)
