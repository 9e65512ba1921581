"""WASI preview 1 `poll_oneoff`: subscriptions in, events out.

Not the waiting and not a clock: the caller brings both. Source: the WASI preview 1 witx, `subscription` and `event`.
Without sockets every descriptor is ready at once, standard input too: the engine reads it ahead, so that nobody can
see whether there is some, and a read waits for it. What a guest waits for here is time.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

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


class Errno(enum.IntEnum):
    """The values that `poll_oneoff` returns or puts into events."""

    SUCCESS = 0
    FAULT = 21
    INVAL = 28
    NOTSUP = 58


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
class Poll:
    """One call. `ready` are events that need no waiting."""

    ready: bytes
    timers: tuple[_Timer, ...]

    def events(self, now: Now) -> bytes:
        """What has happened; empty = nothing yet, wait for `wait(now)`."""
        due = [timer for timer in self.timers if timer.due <= now.of(timer.clock)]
        return self.ready + b"".join([_event(timer.userdata, Errno.SUCCESS, _Type.CLOCK) for timer in due])

    def wait(self, now: Now) -> int:
        """Nanoseconds to the first timer."""
        return min(timer.due - now.of(timer.clock) for timer in self.timers)


def parse_poll(subscriptions: bytes, now: Now, *, has_input: bool = False) -> Poll | Errno:
    """Parse the subscriptions of a call; a relative timer counts from `now`."""
    ready: list[bytes] = []
    timers: list[_Timer] = []
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
            at_end = tag == _Type.FD_READ and fd == _STDIN and not has_input
            ready.append(_event(userdata, Errno.SUCCESS, _Type(tag), 0 if at_end else 1, _HANGUP if at_end else 0))
        else:
            return Errno.INVAL
    if not ready and not timers:
        return Errno.INVAL
    return Poll(b"".join(ready), tuple(timers))


def _event(userdata: int, errno: Errno, kind: _Type, size: int = 0, flags: int = 0) -> bytes:
    return _EVENT.pack(userdata, errno, kind, size, flags)
