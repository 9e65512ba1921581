"""Steps that must run to their end, whatever happens to the caller. Not for work that a user waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def to_the_end(steps: Awaitable[T]) -> T:
    """Await the steps; a cancellation that comes meanwhile takes effect after them."""
    task = asyncio.ensure_future(steps)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
        except Exception:  # noqa: BLE001  raised below, once
            break
    if cancelled:
        raise asyncio.CancelledError
    return task.result()
