"""Containers whose process is a thread of the daemon. The handler's side: a `Run` per guest.

Not the guest's own thread (`handlers.wasmtime.guest`). Invariant: all methods belong to the event loop, and what the
guest's threads tell arrives there.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cri_shim.adapters.cgroups import CgroupHost
from cri_shim.adapters.log_pump import LogPump
from cri_shim.adapters.thread_group import ThreadGroup
from cri_shim.kernel import libc
from cri_shim.kernel.byte_streams import WriteEnd
from cri_shim.kernel.priority import favour, favour_all
from cri_shim.kernel.threads import await_in_new_thread
from cri_shim.model.container import Exit
from cri_shim.model.errors import CriShimError, DeadlineExceeded, FailedPrecondition
from cri_shim.model.handler import HandlerStats, Started
from cri_shim.model.ids import ContainerId
from cri_shim.pb import api_pb2 as pb
from handlers.wasmtime.guest_spec import OPENING_SECONDS, GuestSpec
from handlers.wasmtime.memory_budget import budget
from handlers.wasmtime.output import Output
from handlers.wasmtime.quota import Throttle

if TYPE_CHECKING:
    from handlers.wasmtime.guest import Guest


@dataclass(slots=True)
class GuestRun:
    """`handlers.wasmtime.run.Run` of a guest that has started."""

    guest: Guest
    spec: GuestSpec
    throttle: Throttle
    inputs: set[WriteEnd] = field(default_factory=set)

    def stop(self, signal: int) -> None:
        for entry in self.inputs:  # a guest that waits for input sees the signal when it has an end
            entry.abandon()
        self.guest.stop(signal)

    async def update(
        self, spec: GuestSpec, now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources
    ) -> None:
        """FailedPrecondition when it uses more memory than that: nothing takes any from a module."""
        used, room = self.guest.meter.read().memory, budget(spec.memory_limit, spec.shape).memory
        if 0 <= room < used:
            msg = f"linux.resources.memory_limit_in_bytes: the module uses {used} bytes, more than {room}"
            raise FailedPrecondition(msg, hint="make the container anew with the new limit")
        if spec.cpu is not None:
            self.throttle.start()
        try:
            self.guest.adjust(spec)
        except OSError as error:
            msg = (
                f"linux.resources.cpu_shares and cpuset_cpus: the kernel refuses them for the module: {error.strerror}"
            )
            raise FailedPrecondition(msg) from error
        self.spec = spec

    async def reopen_log(self) -> None:
        if self.guest.output is not None:
            # Not in the pool, which others need too: the file system may hang.
            await await_in_new_thread(self.guest.output.log.reopen)

    async def tap(self, end: socket.socket) -> None:
        if self.guest.output is not None:
            self.guest.output.tap(end)

    async def terminal(self) -> int:
        return -1

    async def end_input(self) -> None:
        self.guest.end_input()

    def stats(self) -> HandlerStats:
        metered = self.guest.meter.read()
        return HandlerStats(metered.cpu_ns, metered.memory, self.spec.memory_limit, self.guest.meter.resident)

    def info(self) -> Mapping[str, object]:
        output = self.guest.output
        if not isinstance(output, Output):
            return {"droppedLogBytes": 0}
        return {"droppedLogBytes": output.log.dropped, "logHangs": output.hangs}


class Guests:
    """Starts guests. The engine has been loaded before."""

    def __init__(self, host: CgroupHost) -> None:
        libc.give_back_large()  # the engine copies what a guest writes to a file
        self._pump = LogPump(begins=favour)
        self._throttle = Throttle()
        self._group = ThreadGroup(host)
        self._favoured = False

    async def start(
        self, container_id: ContainerId, spec: GuestSpec, compiled: Path, ended: Callable[[Exit], None]
    ) -> tuple[GuestRun, Started]:
        """Returns when the module is linked and about to run; `ended` follows exactly once."""
        from handlers.wasmtime.core_module import link_module  # noqa: PLC0415  loaded by the handler's `create`
        from handlers.wasmtime.guest import Guest, Services  # noqa: PLC0415  likewise

        if not self._favoured:
            self._favoured = True
            favour_all()
        self._pump.start()
        if spec.cpu is not None:
            self._throttle.start()
        news = _News(asyncio.get_running_loop(), ended)
        services = Services(self._pump, self._throttle, news, weight=self._group)
        guest = Guest(container_id, spec, str(compiled), services, link_module)
        guest.start()
        try:
            at = await _started(guest, news)
        except (asyncio.CancelledError, DeadlineExceeded):
            news.give_up()
            guest.stop(signal.SIGKILL)
            raise
        return GuestRun(guest, spec, self._throttle), Started(pid=0, at=at)

    def close(self) -> None:
        """End the threads that serve all guests. Blocks."""
        self._throttle.close()
        self._pump.close()
        self._group.close()


async def _started(guest: Guest, news: _News) -> int:
    """When it did. DeadlineExceeded when what it opens is not opened: its thread goes on until that is."""
    before = ""
    while not (await asyncio.wait((news.start,), timeout=OPENING_SECONDS))[0]:
        if before and before == guest.opening:
            raise guest.unopened()
        before = guest.opening
    return news.start.result()


class _News:
    """`handlers.wasmtime.guest.Told`: from the guest's threads into the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ended: Callable[[Exit], None]) -> None:
        self._loop = loop
        self._ended = ended
        self.start: asyncio.Future[int] = loop.create_future()

    def started(self, at: int) -> None:
        self._later(lambda: self.start.set_result(at) if not self.start.done() else None)

    def failed(self, error: CriShimError) -> None:
        self._later(lambda: self.start.set_exception(error) if not self.start.done() else None)

    def ended(self, ended: Exit) -> None:
        self._later(lambda: self._ended(ended))

    def give_up(self) -> None:
        """Nothing is told any more."""
        self.start.cancel()
        self._ended = lambda _: None

    def _later(self, tell: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(tell)
