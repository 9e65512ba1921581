"""UpdateContainerResources: new limits for a container that exists, in the kernel and in its record.

Invariant: what the record says holds in the kernel. A change that fails is taken back, and the record keeps the limits
that held before.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cri_shim.adapters.store import Store
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.locks import Locks
from cri_shim.flows.lookup import existing_container
from cri_shim.flows.undo import Undo
from cri_shim.log import get_logger
from cri_shim.model.container import ContainerRecord, ContainerState
from cri_shim.model.errors import InvalidArgument, WrongState
from cri_shim.model.ids import SHORT, ContainerId
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.container_request import current_resources
from cri_shim.spec.resources import check
from cri_shim.spec.update import merge

log = get_logger()


@dataclass(slots=True)
class UpdateContainer:
    """The flow. Updates of one container follow one another."""

    store: Store
    handlers: Handlers
    locks: Locks
    removals: InFlight[ContainerId, None]

    async def __call__(self, request: pb.UpdateContainerResourcesRequest) -> pb.UpdateContainerResourcesResponse:
        """Change what is asked for; of an EXITED container only the record."""
        if request.HasField("windows"):
            msg = "windows: this node runs Linux"
            raise InvalidArgument(msg)
        check(request.linux)
        container_id = existing_container(self.store, request.container_id).id
        if container_id in self.removals:
            msg = f"container {container_id[:SHORT]} is being removed"
            raise WrongState(msg)
        async with self.locks.hold(container_id):
            await self._update(existing_container(self.store, container_id), request.linux)
        return pb.UpdateContainerResourcesResponse()

    async def _update(self, record: ContainerRecord, asked: pb.LinuxContainerResources) -> None:
        now = current_resources(record)
        wanted = merge(now, asked)
        check(wanted)
        if wanted == now:
            return
        async with Undo("update container resources") as undo:
            if record.state is not ContainerState.EXITED:
                handler = self.handlers.get(record.handler)
                await handler.update(record.id, now, wanted)
                undo.push("restore the limits", lambda: handler.update(record.id, wanted, now))
            stored = wanted.SerializeToString()
            await self.store.containers.update(record.id, lambda old: msgspec.structs.replace(old, resources=stored))
        log.info("container resources updated", container=record.id[:SHORT])
