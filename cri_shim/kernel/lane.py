"""The threads for what blocks: one job after another as long as each is short, side by side when one is not.

    submit ──▶ waiting ──▶ the lane: a thread that does job after job
               └── the job there is older than `patience`: the next one begins in another thread, the lane from now on

Not the throw-away threads (`cri_shim.kernel.threads`). Jobs of many small system calls that run at once do little but
take the interpreter's lock from each other and from the event loop: in a row all of them are done sooner. Invariant: a
job that takes long, or hangs (a mount of a dead server), holds up the next one for `patience`, not for more, as long as
there are fewer than THREADS such.
"""

# mypy: disable-error-code="explicit-override"
from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

from cri_shim.kernel.priority import favour

P = ParamSpec("P")
T = TypeVar("T")
Job = Callable[[], None]

PATIENCE: Final = 0.002
"""Seconds."""
THREADS: Final = 32
_SPARE: Final = 4
"""Threads that stay when they have nothing to do."""
_CLOSE_SECONDS: Final = 5.0


class Lane(ThreadPoolExecutor):
    """The default executor of `loop`, which takes none of another base class; the base's own threads are not used."""

    def __init__(self, loop: asyncio.AbstractEventLoop, patience: float = PATIENCE) -> None:
        super().__init__(max_workers=1)
        self._loop = loop
        self._patience = patience
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._lane: _Thread | None = None
        self._since = 0.0
        """When the job there began."""
        self._idle: list[_Thread] = []
        self._all: set[_Thread] = set()
        self._is_watched = False

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """In the event loop only. A job whose future is cancelled before it begins is left out."""
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    result = function(*args, **kwargs)
                except BaseException as error:  # noqa: BLE001  who waits for it raises it
                    future.set_exception(error)
                else:
                    future.set_result(result)

        with self._lock:
            if self._lane is None:
                self._begin(job)
            else:
                self._waiting.append(job)
                self._watch(self._patience)
        return future

    def _begin(self, job: Job) -> None:
        thread = self._idle.pop() if self._idle else _Thread(self._next)
        self._all.add(thread)
        self._lane, self._since = thread, time.monotonic()
        thread.jobs.put(job)

    def _next(self, thread: _Thread) -> Job | None:
        """For a thread that has done its job: another one; None when it has to wait for one."""
        with self._lock:
            if self._lane is thread:
                if self._waiting:
                    self._since = time.monotonic()
                    return self._waiting.popleft()
                self._lane = None
            if len(self._idle) < _SPARE:
                self._idle.append(thread)
            else:
                self._all.discard(thread)
                thread.jobs.put(None)
        return None

    def _watch(self, seconds: float) -> None:
        if not self._is_watched:
            self._is_watched = True
            self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        """While jobs wait: whether the one before them is there for too long."""
        with self._lock:
            self._is_watched = False
            if not self._waiting:
                return
            left = self._since + self._patience - time.monotonic()
            if left <= 0:
                left = self._patience
                with contextlib.suppress(RuntimeError):  # no thread to be had: the jobs wait on
                    if self._idle or len(self._all) < THREADS:
                        self._begin(self._waiting[0])
                        self._waiting.popleft()
            self._watch(left)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end. One that hangs is not waited for: it ends with the process."""
        del cancel_futures
        end = time.monotonic() + (_CLOSE_SECONDS if wait else 0.0)
        while self._all:  # a job that waits may get a thread of its own meanwhile
            thread = self._all.pop()
            thread.jobs.put(None)
            thread.join(max(0.0, end - time.monotonic()))


class _Thread(threading.Thread):
    """`following` is asked for another job after each."""

    def __init__(self, following: Callable[[_Thread], Job | None]) -> None:
        super().__init__(name="lane", daemon=True)
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._following = following
        self.start()

    def run(self) -> None:
        favour()  # who waits for the job is the loop
        while (job := self.jobs.get()) is not None:
            following: Job | None = job
            while following is not None:
                following()
                following = self._following(self)
