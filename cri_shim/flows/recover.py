"""Start-up recovery: records on one side, the world on the other, every difference settled before anything is served.

Not a repair of running containers: those are only watched again. Invariant: after `run` there is no PENDING record, no
pod or container directory without a record, and every RUNNING container has somebody who will tell its end.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cri_shim.adapters import rootfs, sandbox
from cri_shim.adapters.network import Network
from cri_shim.adapters.store import Store
from cri_shim.flows.attachment import attachment
from cri_shim.flows.container_create import CreateContainer
from cri_shim.flows.container_remove import discard
from cri_shim.flows.container_start import with_start
from cri_shim.flows.exits import Exits
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.image_volumes import ImageVolumes
from cri_shim.flows.pod_ipc import PodIpc
from cri_shim.flows.pod_undo import UndoPod
from cri_shim.log import get_logger
from cri_shim.model.clock import Clock
from cri_shim.model.container import ContainerRecord, ContainerState, Exit, Reason
from cri_shim.model.errors import CriShimError
from cri_shim.model.handler import Started
from cri_shim.model.ids import SHORT, ContainerId, PodId
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.model.pod import PodRecord, PodState
from cri_shim.pb import api_pb2 as pb

log = get_logger()
LOST = 255
"""Exit code of a container whose end nobody saw (containerd's choice, which clients know)."""


@dataclass(slots=True)
class Recover:
    """The flow. What an earlier daemon left in flight has ended before it runs."""

    store: Store
    layout: Layout
    handlers: Handlers
    undo_pod: UndoPod
    network: Network
    exits: Exits
    create: CreateContainer
    image_volumes: ImageVolumes
    pod_ipc: PodIpc
    node: NodeFacts
    clock: Clock

    async def run(self) -> None:
        """Settle everything. A part that cannot be settled is logged, kept and shown as not ready."""
        containers = self.store.containers.values()
        await asyncio.gather(*(self._container(record) for record in containers))
        await asyncio.gather(*(self._pod(pod) for pod in self.store.pods.values()))
        await self._orphans()
        log.info("recovered", pods=len(self.store.pods.keys()), containers=len(self.store.containers.keys()))

    async def _container(self, record: ContainerRecord) -> None:
        try:
            if record.state is ContainerState.PENDING and not (record.infra and record.started_at):
                await self._discard(record)
            elif record.state is not ContainerState.EXITED:
                await self._adopt(record)
        except (CriShimError, OSError) as error:
            log.warning("cannot recover a container", container=record.id[:SHORT], error=str(error))
            if record.state is not ContainerState.PENDING:
                await self.exits.record(record.id, self._lost(str(error)))

    async def _adopt(self, record: ContainerRecord) -> None:
        handler = self.handlers.live.get(record.handler)
        if handler is None:
            # Nobody can watch it. Left running, it would run beside the one that the client starts in its place.
            await discard(self.store, self.layout, self.handlers, record)
            await self.exits.record(record.id, self._lost(f"handler {record.handler!r} is no longer configured"))
            return
        found = await handler.adopt(record, self.create.plan(record))
        if isinstance(found, Exit):
            await self.exits.record(record.id, found)
        elif isinstance(found, Started):
            await self.store.containers.update(record.id, lambda old: with_start(old, found))

    async def _discard(self, record: ContainerRecord) -> None:
        await discard(self.store, self.layout, self.handlers, record)
        await self.store.containers.delete(record.id)
        await self.image_volumes.release(record)

    async def _pod(self, pod: PodRecord) -> None:
        if pod.state is PodState.PENDING:
            await self.undo_pod(pod.id)
        elif pod.state is PodState.READY:
            needs_ipc = self.pod_ipc.is_needed(pod)
            if problem := await asyncio.to_thread(self._missing, pod, needs_ipc=needs_ipc):
                await self.undo_pod.not_ready(pod.id, problem)
        # Of a container whose record went in the last moment of the earlier daemon.
        await self.image_volumes.release_unused(pod.id)

    def _missing(self, pod: PodRecord, *, needs_ipc: bool) -> str:
        """Why a READY pod is not: its namespaces are kernel objects, which a reboot takes."""
        if pod.boot_id != self.node.boot_id:
            return "the node was rebooted"
        config = pb.PodSandboxConfig.FromString(pod.config)
        return sandbox.missing(self.layout, pod.id, config, needs_ipc=needs_ipc) if self.node.root else ""

    async def _orphans(self) -> None:
        """Directories without a record, left by a daemon whose database is lost."""
        found = await asyncio.to_thread(_ids_on_disk, self.layout)
        known = {*self.store.containers.keys(), *self.store.pods.keys()}
        await asyncio.gather(*(self._orphan(name) for name in found - known))

    async def _orphan(self, name: str) -> None:
        """A container, a pod, or a pod with its infra container."""
        try:
            for handler in self.handlers.live.values():
                await handler.delete(ContainerId(name), "")
            await asyncio.to_thread(rootfs.remove, self.layout, ContainerId(name))
            if self.layout.namespace(PodId(name), "net").exists():
                await self.network.delete(attachment(PodId(name), pb.PodSandboxConfig(), self.layout), None)
            await asyncio.to_thread(sandbox.remove, self.layout, PodId(name))
            log.warning("removed what had no record", id=name[:SHORT])
        except (CriShimError, OSError) as error:
            log.warning("cannot remove what has no record", id=name[:SHORT], error=str(error))

    def _lost(self, why: str) -> Exit:
        return Exit(code=LOST, at=self.clock.now(), reason=Reason.UNKNOWN, message=why)


def _ids_on_disk(layout: Layout) -> set[str]:
    return {
        entry.name
        for directory in (layout.pods, layout.bundles, layout.writables)
        if directory.is_dir()
        for entry in directory.iterdir()
    }
