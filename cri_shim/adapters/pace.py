"""How many programs begin at the same time: a hundred at once take as long as one after the other, and stop all else.

Not a limit of what runs. Invariant: who has waited longest is next, and what hangs holds nobody up for longer than
`patience`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from typing import Final

PER_CPU: Final = 2
"""Starts at once: a runtime waits for the kernel (cgroups, mounts) half of its time."""
PATIENCE_SECONDS: Final = 1.0
"""A start takes 10 to 50 ms. What takes longer than this waits for something else than a processor."""


class Pace:
    """Gives out turns."""

    def __init__(self, at_once: int, patience: float = PATIENCE_SECONDS) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._patience = patience

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """Wait for a turn; it ends with the block, or when patience does."""
        await self._free.acquire()
        with contextlib.ExitStack() as held:
            held.callback(self._free.release)
            timer = asyncio.get_running_loop().call_later(self._patience, held.close)
            try:
                yield
            finally:
                timer.cancel()


def pace_of_this_machine() -> Pace:
    """For all runtimes together."""
    return Pace(PER_CPU * len(os.sched_getaffinity(0)))
