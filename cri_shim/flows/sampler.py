"""The readings between calls: a rate needs two, and a writable layer takes long.

Invariant: it never fails and never hurries; a daemon without containers only looks whether there are any.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from cri_shim.flows.stats import Stats
from cri_shim.log import get_logger
from cri_shim.model.errors import CriShimError

log = get_logger()

ROUND_SECONDS = 10.0
"""As often as the kubelet asks."""
_SOONEST_SECONDS = 0.1


@dataclass(slots=True)
class Sampler:
    """A task of the daemon's own, from `start` to `aclose`."""

    stats: Stats
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def aclose(self) -> None:
        """End, whatever is being measured."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROUND_SECONDS):
                    await self.stats.missed.wait()
            try:
                await self.stats.refresh()
            except (CriShimError, OSError, RuntimeError) as error:  # RuntimeError: there can be no more threads
                log.warning("cannot measure what containers use", error=str(error))
            await asyncio.sleep(_SOONEST_SECONDS)
