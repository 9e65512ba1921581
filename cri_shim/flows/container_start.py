"""StartContainer: only from CREATED, in a READY pod.

Invariant: a start that fails leaves the container EXITED, 128, StartError, with the cause as its message: the kubelet
shows it and starts over with a new container.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cri_shim.adapters.store import Store
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.locks import Locks
from cri_shim.flows.lookup import existing_container
from cri_shim.log import get_logger
from cri_shim.model.clock import Clock
from cri_shim.model.container import ContainerRecord, ContainerState, Exit, Reason
from cri_shim.model.errors import CriShimError, WrongState
from cri_shim.model.handler import Started
from cri_shim.model.ids import SHORT, ContainerId
from cri_shim.model.pod import PodState
from cri_shim.pb import api_pb2 as pb

log = get_logger()
START_ERROR = 128


@dataclass(slots=True)
class StartContainer:
    """The flow. It goes on when its caller leaves; a second call meanwhile is refused."""

    store: Store
    handlers: Handlers
    locks: Locks
    clock: Clock
    starts: InFlight[ContainerId, None]

    async def __call__(self, request: pb.StartContainerRequest) -> pb.StartContainerResponse:
        """Start a container that has been created."""
        record = existing_container(self.store, request.container_id)
        if record.id in self.starts:
            msg = f"container {record.id[:SHORT]} is being started"
            raise WrongState(msg)
        await self.starts.join(record.id, lambda: self._locked(record.id))
        return pb.StartContainerResponse()

    async def _locked(self, container_id: ContainerId) -> None:
        async with self.locks.hold(container_id):
            record = existing_container(self.store, container_id)
            self._check(record)
            await self._start(record)

    def _check(self, record: ContainerRecord) -> None:
        if record.state is not ContainerState.CREATED:
            msg = f"container {record.id[:SHORT]} is {record.state.value}, only a created one can be started"
            raise WrongState(msg)
        pod = self.store.pods.get(record.pod_id)
        if pod is None or pod.state is not PodState.READY:
            msg = f"pod sandbox {record.pod_id[:SHORT]} of the container is not ready"
            raise WrongState(msg)

    async def _start(self, record: ContainerRecord) -> None:
        handler = self.handlers.get(record.handler)
        try:
            started = await handler.start(record.id)
        except (CriShimError, OSError) as error:
            now = self.clock.now()
            failed = Exit(code=START_ERROR, at=now, reason=Reason.START_ERROR, message=str(error))
            await self.store.containers.update(
                record.id, lambda old: msgspec.structs.replace(old, started_at=now, exit=failed, pid=0)
            )
            raise
        await self.store.containers.update(record.id, lambda old: with_start(old, started))
        log.info("container started", container=record.id[:SHORT], pod=record.pod_id[:SHORT], handler=record.handler)


def with_start(record: ContainerRecord, started: Started) -> ContainerRecord:
    """The record with its start; a short-lived process may have ended already."""
    pid = 0 if record.exit is not None else started.pid
    return msgspec.structs.replace(record, started_at=started.at, pid=pid)
