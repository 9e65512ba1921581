"""A stack of named undo steps: what a flow has acquired, and how each thing is released.

Not a transaction: steps run on the real world and may fail. Invariant: on failure every step runs, last first, each
with its own deadline, whether or not an earlier one failed, and even when the caller has been cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from cri_shim.adapters.shielded import to_the_end
from cri_shim.log import get_logger

STEP_SECONDS = 30.0
ATTEMPTS = 2

log = get_logger()


@dataclass(slots=True)
class Undo:
    """`async with Undo("run pod") as undo: undo.push("unmount", step)`. Steps run only when the block raises."""

    what: str
    failures: list[str] = field(default_factory=list)
    """After the block: `step: error` for each step that did not succeed. Something is left behind then."""
    _steps: list[tuple[str, Callable[[], Awaitable[object]]]] = field(default_factory=list)

    def push(self, name: str, step: Callable[[], Awaitable[object]]) -> None:
        """Name how the thing that was just acquired is released. The step must be idempotent."""
        self._steps.append((name, step))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            return
        # A further cancellation has nothing to add: the exception that brought us here goes on.
        with contextlib.suppress(asyncio.CancelledError):
            await to_the_end(self._unwind())

    async def _unwind(self) -> None:
        while self._steps:
            name, step = self._steps.pop()
            failure = await _attempt(step)
            if failure:
                self.failures.append(f"{name}: {failure}")
                log.error("undo step failed", flow=self.what, step=name, error=failure)


async def _attempt(step: Callable[[], Awaitable[object]]) -> str:
    failure = ""
    for _ in range(ATTEMPTS):
        try:
            async with asyncio.timeout(STEP_SECONDS):
                await step()
        except Exception as error:  # noqa: BLE001 (every step must run, whatever another one does)
            failure = str(error) or type(error).__name__
        else:
            return ""
    return failure
