"""How late a loop comes to what is due: the measure of whether anything blocks it.

Not a test by itself: on a busy machine every loop is late. Invariant: a stretch in which the loop does not turn counts
once for each time that something was due in it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

INTERVAL = 0.001


@dataclass
class Lag:
    """Seconds, one for each INTERVAL."""

    samples: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """`share` between 0 and 1."""
        ordered = sorted(self.samples) or [0.0]
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


@contextlib.asynccontextmanager
async def measured_lag() -> AsyncIterator[Lag]:
    """Measures the running loop until the end of the block."""
    lag = Lag()

    async def look() -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + INTERVAL
        while True:
            await asyncio.sleep(max(0.0, due - loop.time()))
            while due <= loop.time():
                lag.samples.append(loop.time() - due)
                due += INTERVAL

    task = asyncio.create_task(look())
    try:
        yield lag
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
