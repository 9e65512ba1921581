"""WASI preview 1 `poll_oneoff`: subscriptions in, events out.

Not the waiting and not a clock: the caller brings both. Source: the WASI preview 1 witx, `subscription` and `event`.
Every descriptor but a socket is ready at once, standard input too: the engine reads it ahead, so that nobody can see
whether there is some, and a read waits for it. What a guest without sockets waits for is time.
"""

from __future__ import annotations

import enum
import select
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from handlers.wasmtime.errnos import Errno

SUBSCRIPTION: Final = struct.Struct("<QB7x")
_CLOCK: Final = struct.Struct("<I4xQQH6x")
_DESCRIPTOR: Final = struct.Struct("<I28x")
_EVENT: Final = struct.Struct("<QHB5xQH6x")
SUBSCRIPTION_SIZE: Final = SUBSCRIPTION.size + _CLOCK.size
EVENT_SIZE: Final = _EVENT.size
MAX_SUBSCRIPTIONS: Final = 4096
"""More are refused: parsing them holds up the daemon, not only the guest."""

_ABSOLUTE: Final = 1
_HANGUP: Final = 1
_STDIN: Final = 0
_VERY_LONG: Final = 1 << 62
_NOTHING: Final[Mapping[int, int]] = {}


class Clock(enum.IntEnum):
    """Clocks that a guest can wait for; those of CPU time cannot be waited for."""

    REALTIME = 0
    MONOTONIC = 1


class _Type(enum.IntEnum):
    CLOCK = 0
    FD_READ = 1
    FD_WRITE = 2


@dataclass(frozen=True, slots=True)
class Now:
    """Nanoseconds, as the guest's own `clock_time_get` counts them."""

    realtime: int
    monotonic: int

    def of(self, clock: Clock) -> int:
        return self.realtime if clock is Clock.REALTIME else self.monotonic


@dataclass(frozen=True, slots=True)
class _Timer:
    userdata: int
    clock: Clock
    due: int


@dataclass(frozen=True, slots=True)
class _Watch:
    userdata: int
    kind: _Type
    fd: int

    @property
    def event(self) -> int:
        return select.POLLIN if self.kind is _Type.FD_READ else select.POLLOUT


@dataclass(frozen=True, slots=True)
class Poll:
    """One call. `ready` are events that need no waiting, `watches` those of sockets."""

    ready: bytes
    timers: tuple[_Timer, ...]
    watches: tuple[_Watch, ...] = ()

    @property
    def watched(self) -> dict[int, int]:
        """The sockets with the poll(2) events that are asked for."""
        wanted: dict[int, int] = {}
        for watch in self.watches:
            wanted[watch.fd] = wanted.get(watch.fd, 0) | watch.event
        return wanted

    def events(self, now: Now, ready: Mapping[int, int] = _NOTHING) -> bytes:
        """What has happened; empty = nothing yet, wait for `wait(now)`. `ready`: sockets with their poll(2) events."""
        due = [timer for timer in self.timers if timer.due <= now.of(timer.clock)]
        happened = [_event(timer.userdata, Errno.SUCCESS, _Type.CLOCK) for timer in due]
        for watch in self.watches:
            found = ready.get(watch.fd, 0)
            if found & select.POLLNVAL:
                happened.append(_event(watch.userdata, Errno.BADF, watch.kind))
            elif found & (watch.event | select.POLLHUP | select.POLLERR):
                flags = _HANGUP if found & (select.POLLHUP | select.POLLERR) else 0
                happened.append(_event(watch.userdata, Errno.SUCCESS, watch.kind, 1, flags))
        return self.ready + b"".join(happened)

    def wait(self, now: Now) -> int:
        """Nanoseconds to the first timer; without any, a long time."""
        return min((timer.due - now.of(timer.clock) for timer in self.timers), default=_VERY_LONG)


def parse_poll(
    subscriptions: bytes, now: Now, *, has_input: bool = False, is_socket: Callable[[int], bool] = lambda _: False
) -> Poll | Errno:
    """Parse the subscriptions of a call; a relative timer counts from `now`."""
    ready: list[bytes] = []
    timers: list[_Timer] = []
    watches: list[_Watch] = []
    for offset in range(0, len(subscriptions), SUBSCRIPTION_SIZE):
        userdata, tag = SUBSCRIPTION.unpack_from(subscriptions, offset)
        content = offset + SUBSCRIPTION.size
        if tag == _Type.CLOCK:
            number, timeout, _, flags = _CLOCK.unpack_from(subscriptions, content)
            if number not in {Clock.REALTIME, Clock.MONOTONIC}:
                ready.append(_event(userdata, Errno.NOTSUP, _Type.CLOCK))
                continue
            clock = Clock(number)
            timers.append(_Timer(userdata, clock, timeout if flags & _ABSOLUTE else now.of(clock) + timeout))
        elif tag in {_Type.FD_READ, _Type.FD_WRITE}:
            (fd,) = _DESCRIPTOR.unpack_from(subscriptions, content)
            if is_socket(fd):
                watches.append(_Watch(userdata, _Type(tag), fd))
                continue
            at_end = tag == _Type.FD_READ and fd == _STDIN and not has_input
            ready.append(_event(userdata, Errno.SUCCESS, _Type(tag), 0 if at_end else 1, _HANGUP if at_end else 0))
        else:
            return Errno.INVAL
    if not ready and not timers and not watches:
        return Errno.INVAL
    return Poll(b"".join(ready), tuple(timers), tuple(watches))


def _event(userdata: int, errno: Errno, kind: _Type, size: int = 0, flags: int = 0) -> bytes:
    return _EVENT.pack(userdata, errno, kind, size, flags)
