"""How late a loop comes to what is due: the measure of whether anything blocks it.

Not a test by itself: on a busy machine every loop is late. Invariant: a stretch in which the loop does not turn counts
once for each time that something was due in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL = 0.001


@dataclass
class Lag:
    """Seconds, one for each INTERVAL."""

    samples: list[float] = field(default_factory=list)
    """From when something was due until the loop came to it, whatever was in the way."""
    own: list[float] = field(default_factory=list)
    """Without the time in which the loop's thread was ready to run and had no processor (proc(5), schedstat)."""

    def clear(self) -> None:
        self.samples.clear()
        self.own.clear()


def percentile(samples: list[float], share: float) -> float:
    """`share` between 0 and 1."""
    ordered = sorted(samples) or [0.0]
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


@contextlib.asynccontextmanager
async def measured_lag() -> AsyncIterator[Lag]:
    """Measures the running loop until the end of the block."""
    lag = Lag()
    schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")

    def without_processor() -> float:
        return int(schedstat.read_bytes().split()[1]) / 1e9

    async def look() -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + INTERVAL
        waited = without_processor()
        while True:
            await asyncio.sleep(max(0.0, due - loop.time()))
            before, waited = waited, without_processor()
            while due <= loop.time():
                late = loop.time() - due
                lag.samples.append(late)
                lag.own.append(max(0.0, late - (waited - before)))
                due += INTERVAL

    task = asyncio.create_task(look())
    try:
        yield lag
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
