"""Throw-away threads: the only safe place for unshare(2) and setns(2), which change the calling thread for good.

Not a pool. Invariant: a thread that has run a function here is never used again.
"""

from __future__ import annotations

import _thread
import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from cri_shim.kernel.priority import favour

T = TypeVar("T")


def _start(function: Callable[[], T]) -> Future[T]:
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # who waits no longer does not take it away from the thread

    def body() -> None:
        favour()  # somebody waits for it
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  the caller's thread raises it
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    # Nobody waits for such a thread: a mount that hangs (a dead NFS server) must not keep a stopping daemon alive. Nor
    # for its beginning, as `threading.Thread.start` does: on a busy machine that takes milliseconds.
    _thread.start_new_thread(body, ())
    return outcome


def call_in_new_thread(function: Callable[[], T]) -> T:
    """Run `function` in a thread of its own, wait for it, return its result or raise its error. Blocks."""
    return _start(function).result()


async def await_in_new_thread(function: Callable[[], T]) -> T:
    """The same without blocking the loop. A cancelled wait does not stop the thread."""
    return await asyncio.wrap_future(_start(function))
