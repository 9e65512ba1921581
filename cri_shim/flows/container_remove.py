"""RemoveContainer: kill what runs, remove what was made, delete the record. The log file stays: it is the kubelet's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cri_shim.adapters import rootfs
from cri_shim.adapters.store import Store
from cri_shim.flows.container_stop import StopContainer
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.image_volumes import ImageVolumes
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.locks import Locks
from cri_shim.flows.lookup import find_container
from cri_shim.log import get_logger
from cri_shim.model.container import ContainerRecord
from cri_shim.model.ids import SHORT, ContainerId
from cri_shim.model.layout import Layout
from cri_shim.pb import api_pb2 as pb

log = get_logger()


@dataclass(slots=True)
class RemoveContainer:
    """The flow. Concurrent calls for one container share one run."""

    store: Store
    layout: Layout
    handlers: Handlers
    stop_container: StopContainer
    locks: Locks
    collector: ImageCollector
    image_volumes: ImageVolumes
    removals: InFlight[ContainerId, None]

    async def __call__(self, request: pb.RemoveContainerRequest) -> pb.RemoveContainerResponse:
        """Remove a container; an unknown one is success, a running one is killed first."""
        container = find_container(self.store, request.container_id)
        if container is not None:
            await self.remove(container.id)
        return pb.RemoveContainerResponse()

    async def remove(self, container_id: ContainerId) -> None:
        """Remove by full id, visible or not."""
        await self.removals.join(container_id, lambda: self._remove(container_id))

    async def _remove(self, container_id: ContainerId) -> None:
        async with self.locks.hold(container_id):
            await self.stop_container.stop(container_id, 0)
            record = self.store.containers.get(container_id)
            if record is None:
                return
            await discard(self.store, self.layout, self.handlers, record)
            await self.store.containers.delete(container_id)
        # Its image may have been removed before it.
        await self.collector.drop_unused(record.layers)
        await self.image_volumes.release(record)
        log.info("container is removed", container=container_id[:SHORT])


async def discard(store: Store, layout: Layout, handlers: Handlers, record: ContainerRecord) -> None:
    """Remove everything of a container but its record, from any half-made state."""
    pod = store.pods.get(record.pod_id)
    cgroup_parent = pb.PodSandboxConfig.FromString(pod.config).linux.cgroup_parent if pod is not None else ""
    # A container that was never dispatched has nothing with any handler; one whose handler is gone from the
    # configuration can only be cleaned by those that there are.
    known = handlers.live.get(record.handler)
    for handler in [known] if known is not None else handlers.live.values():
        await handler.delete(record.id, cgroup_parent)
    await asyncio.to_thread(rootfs.remove, layout, record.id)
