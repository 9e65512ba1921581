"""The end of a container: told once by its handler, recorded once, awaited by whoever stops it.

Not a poller. Invariant: state, exit code and reason become visible in one replacement of the record.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from cri_shim.adapters.store import Store
from cri_shim.flows.later import Later
from cri_shim.log import get_logger
from cri_shim.model.container import ContainerRecord, Exit
from cri_shim.model.errors import CriShimError
from cri_shim.model.ids import SHORT, ContainerId, PodId
from cri_shim.model.pod import PodRecord

log = get_logger()


class Exits:
    """Records exits; `wait` returns when one is recorded."""

    def __init__(self, store: Store, later: Later) -> None:
        self._store = store
        self._later = later
        self._events: dict[ContainerId, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def exited(self, container_id: ContainerId, ended: Exit) -> None:
        """The handlers' callback, in the event loop."""
        task = asyncio.get_running_loop().create_task(self.record(container_id, ended))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def record(self, container_id: ContainerId, ended: Exit) -> None:
        """Write the exit down, unless one is there already. Clients see RUNNING until that succeeds."""
        try:
            await self._record(container_id, ended)
        except CriShimError as error:
            name = container_id[:SHORT]
            log.error("cannot record the exit yet", container=name, code=ended.code, error=str(error))
            self._later.insist(f"recording the exit of container {name}", lambda: self._record(container_id, ended))

    async def _record(self, container_id: ContainerId, ended: Exit) -> None:
        record = await self._store.containers.update(container_id, lambda old: with_exit(old, ended))
        if record is not None and record.infra:
            await self._infra_ended(record)
        if (event := self._events.get(container_id)) is not None:
            event.set()
        if record is not None:
            log.info("container exited", container=container_id[:SHORT], code=ended.code, reason=str(ended.reason))

    async def wait(self, container_id: ContainerId, timeout: float | None) -> bool:
        """Wait until the container is EXITED (or gone); False when `timeout` seconds pass before."""
        event = self._events.setdefault(container_id, asyncio.Event())
        try:
            if self._has_ended(container_id):
                return True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await event.wait()
            return self._has_ended(container_id)
        finally:
            if self._has_ended(container_id):
                self._events.pop(container_id, None)

    async def drain(self) -> None:
        """Wait for the exits that are being written."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _has_ended(self, container_id: ContainerId) -> bool:
        record = self._store.containers.get(container_id)
        return record is None or record.exit is not None

    async def _infra_ended(self, infra: ContainerRecord) -> None:
        """A pod whose shared PID namespace is gone cannot start containers: it is not ready, and the client decides."""
        at = infra.exit.at if infra.exit else 0

        def not_ready(pod: PodRecord) -> PodRecord:
            if pod.stopped_at:
                return pod
            return msgspec.structs.replace(pod, stopped_at=at, problem="the process of the shared PID namespace ended")

        await self._store.pods.update(PodId(infra.pod_id), not_ready)


def with_exit(record: ContainerRecord, ended: Exit) -> ContainerRecord:
    """The record with its end; the first end stays."""
    if record.exit is not None:
        return record
    return msgspec.structs.replace(record, exit=ended, pid=0)
