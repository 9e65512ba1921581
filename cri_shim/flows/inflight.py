"""One task per key, shared by everybody who asks for the same thing while it runs.

Not a cache: a finished task is forgotten. Invariant: a caller's cancellation never cancels the task, unless the owner
asked for that when the last caller has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True)
class _Entry(Generic[T]):
    task: asyncio.Task[T]
    request: object
    waiters: int = 0


@dataclass(slots=True)
class InFlight(Generic[K, T]):
    """Running tasks by key."""

    cancel_when_abandoned: bool = False
    _running: dict[K, _Entry[T]] = field(default_factory=dict)

    def __contains__(self, key: K) -> bool:
        return key in self._running

    def differs(self, key: K, request: object) -> bool:
        """Whether a task of `key` runs that was started for another request."""
        entry = self._running.get(key)
        return entry is not None and entry.request != request

    async def join(self, key: K, factory: Callable[[], Awaitable[T]], request: object = None) -> T:
        """Wait for the running task of `key`, or start one; its result or exception goes to every waiter.

        `request` is what the task is started for; who must not join another's asks `differs` before.
        """
        entry = self._running.get(key)
        if entry is None:
            entry = _Entry(asyncio.ensure_future(_as_coroutine(factory)), request)
            self._running[key] = entry
            entry.task.add_done_callback(lambda task: self._forget(key, task))
        entry.waiters += 1
        try:
            return await asyncio.shield(entry.task)
        finally:
            entry.waiters -= 1
            if entry.waiters == 0 and self.cancel_when_abandoned and not entry.task.done():
                entry.task.cancel()
                # The next caller starts afresh, it must not join a task that is being cancelled.
                if self._running.get(key) is entry:
                    del self._running[key]

    async def drain(self) -> None:
        """Wait until everything that runs now has ended, however it ends."""
        await asyncio.gather(*(entry.task for entry in self._running.values()), return_exceptions=True)

    def _forget(self, key: K, task: asyncio.Task[T]) -> None:
        entry = self._running.get(key)
        if entry is not None and entry.task is task:
            del self._running[key]
        if not task.cancelled():
            # Everybody may have left: an exception that nobody fetches is not a defect here.
            task.exception()


async def _as_coroutine(factory: Callable[[], Awaitable[T]]) -> T:
    return await factory()
