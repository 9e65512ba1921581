"""`wasi:clocks`: the kernel's clocks, as a process sees them."""

from __future__ import annotations

import time
from typing import Final

from handlers.wasmtime.wasip2.interface import Interface
from handlers.wasmtime.wasip2.poll import Pollable
from handlers.wasmtime.wasip2.waiter import NEVER, Interest, Source, Timer
from handlers.wasmtime.wasip2.world import World

_BILLION: Final = 1_000_000_000
_END_OF_TIME: Final = (1 << 63) - 1
"""Of the kernel's monotonic clock, ns."""


class _Never(Source):
    """A time that does not come."""

    def interest(self) -> Interest:
        return NEVER


def monotonic(world: World) -> Interface:
    """`wasi:clocks/monotonic-clock`."""

    def subscribe_instant(when: int) -> Pollable:
        return Pollable(world.waiter, Timer(when) if when <= _END_OF_TIME else _Never())

    return Interface(
        {"pollable": Pollable},
        {
            "now": time.monotonic_ns,
            "resolution": lambda: _nanoseconds(time.CLOCK_MONOTONIC),
            "subscribe-instant": subscribe_instant,
            "subscribe-duration": lambda duration: subscribe_instant(time.monotonic_ns() + duration),
        },
    )


def wall(_world: World) -> Interface:
    """`wasi:clocks/wall-clock`."""
    return Interface(
        {},
        {
            "now": lambda: _datetime(time.time_ns()),
            "resolution": lambda: _datetime(_nanoseconds(time.CLOCK_REALTIME)),
        },
    )


def _nanoseconds(clock: int) -> int:
    return round(time.clock_getres(clock) * _BILLION)


def _datetime(nanoseconds: int) -> dict[str, int]:
    seconds, rest = divmod(nanoseconds, _BILLION)
    return {"seconds": seconds, "nanoseconds": rest}
