"""What has to come true and cannot now: tried again until it does, as long as the daemon runs.

Not for what a client repeats. Invariant: what is still open when the daemon ends is what recovery finds at its next
start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cri_shim.log import get_logger
from cri_shim.model.errors import CriShimError

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 60.0

log = get_logger()


class Later:
    """Tasks of the daemon's own, one per thing."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def insist(self, what: str, step: Callable[[], Awaitable[object]]) -> None:
        """Begin to try; the pauses between get longer. The step must be idempotent."""
        task = asyncio.get_running_loop().create_task(_until_done(what, step))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Give up."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_done(what: str, step: Callable[[], Awaitable[object]]) -> None:
    pause = FIRST_SECONDS
    while True:
        await asyncio.sleep(pause)
        try:
            await step()
        except (CriShimError, OSError) as error:
            log.warning("tried again in vain", what=what, error=str(error))
            pause = min(2 * pause, LONGEST_SECONDS)
        else:
            log.info("done at last", what=what)
            return
