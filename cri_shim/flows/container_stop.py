"""StopContainer: the stop signal once, the grace period, then SIGKILL to every process.

    asked ──▶ signalled ──deadline──▶ killed ──▶ exit recorded
                  ▲ a later call with a shorter timeout moves the deadline forward, never back

Not a waiter on processes: the handler tells the exit, `Exits` records it. Invariant: the stop signal is sent at most
once, and a call returns only when the exit is visible.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass, field

from cri_shim.adapters.store import Store
from cri_shim.flows.exits import Exits
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.lookup import find_container
from cri_shim.model.container import ContainerRecord, ContainerState
from cri_shim.model.errors import DeadlineExceeded
from cri_shim.model.ids import SHORT, ContainerId
from cri_shim.pb import api_pb2 as pb

KILL_SECONDS = 30.0
"""How long after SIGKILL an exit is awaited before the call fails; the next one tries again."""


@dataclass(slots=True)
class _Stop:
    deadline: float
    sooner: asyncio.Event
    task: asyncio.Task[None] | None = None


@dataclass(slots=True)
class StopContainer:
    """The flow: one stop per container, joined by every caller."""

    store: Store
    handlers: Handlers
    exits: Exits
    _stops: dict[ContainerId, _Stop] = field(default_factory=dict)

    async def __call__(self, request: pb.StopContainerRequest) -> pb.StopContainerResponse:
        """Stop a container; an unknown one, and one that does not run, is success."""
        container = find_container(self.store, request.container_id)
        if container is not None:
            await self.stop(container.id, max(0, request.timeout))
        return pb.StopContainerResponse()

    async def stop(self, container_id: ContainerId, timeout: float) -> None:
        """Stop by full id, SIGKILL after `timeout` seconds at the latest."""
        record = self.store.containers.get(container_id)
        if record is None or record.state is not ContainerState.RUNNING:
            return
        deadline = asyncio.get_running_loop().time() + timeout
        stop = self._stops.get(container_id)
        if stop is None:
            stop = _Stop(deadline, asyncio.Event())
            self._stops[container_id] = stop
            stop.task = asyncio.create_task(self._run(record, stop))
            stop.task.add_done_callback(lambda task: self._forget(container_id, task))
        elif deadline < stop.deadline:
            stop.deadline = deadline
            stop.sooner.set()
        if stop.task is not None:
            await asyncio.shield(stop.task)

    def _forget(self, container_id: ContainerId, task: asyncio.Task[None]) -> None:
        self._stops.pop(container_id, None)
        if not task.cancelled():
            task.exception()  # every caller may have left

    async def _run(self, record: ContainerRecord, stop: _Stop) -> None:
        handler = self.handlers.get(record.handler)
        now = asyncio.get_running_loop().time
        if stop.deadline > now():
            await handler.kill(record.id, record.stop_signal)
            while (left := stop.deadline - now()) > 0:
                stop.sooner.clear()
                if await self._exit_or_sooner(record.id, stop, left):
                    return
        end = now() + KILL_SECONDS
        while now() < end:
            await handler.kill(record.id, signal.SIGKILL, everyone=True)
            if await self.exits.wait(record.id, 2.0):
                return
        msg = f"container {record.id[:SHORT]} has not exited {KILL_SECONDS:.0f} s after SIGKILL"
        raise DeadlineExceeded(msg, hint="a process in it may be stuck in the kernel (state D)")

    async def _exit_or_sooner(self, container_id: ContainerId, stop: _Stop, left: float) -> bool:
        """Wait for the exit, at most `left` seconds and until a caller shortens the deadline; True = it has exited."""
        waits = {
            asyncio.create_task(self.exits.wait(container_id, left)),
            asyncio.create_task(stop.sooner.wait()),
        }
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        record = self.store.containers.get(container_id)
        return record is None or record.exit is not None
