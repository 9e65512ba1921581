"""StopPodSandbox: NOTREADY first, then containers, the shared PID namespace, the network, the pins.

Not a removal: record, files and logs stay. Invariant: it can be called at any time, any number of times, and finishes
what an earlier call left.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec

from cri_shim.adapters import sandbox
from cri_shim.adapters.store import Store
from cri_shim.flows.container_stop import StopContainer
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.infra import Infra
from cri_shim.flows.locks import Locks
from cri_shim.flows.lookup import find_pod
from cri_shim.flows.pod_detach import DetachPod
from cri_shim.log import get_logger
from cri_shim.model.clock import Clock
from cri_shim.model.errors import Internal
from cri_shim.model.ids import SHORT, PodId
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.model.pod import PodRecord
from cri_shim.pb import api_pb2 as pb

log = get_logger()


@dataclass(slots=True)
class StopPod:
    """The flow. Concurrent calls for one pod share one run."""

    store: Store
    layout: Layout
    detach: DetachPod
    infra: Infra
    stop_container: StopContainer
    locks: Locks
    node: NodeFacts
    clock: Clock
    stops: InFlight[PodId, None] = field(default_factory=InFlight)
    _stopped: set[PodId] = field(default_factory=set)
    """By this daemon, to the end: nothing can come after that."""

    async def __call__(self, request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
        """Stop a pod; an unknown one is success."""
        pod = find_pod(self.store, request.pod_sandbox_id)
        if pod is not None:
            await self.stop(pod.id)
        return pb.StopPodSandboxResponse()

    async def stop(self, pod_id: PodId) -> None:
        """Stop by full id."""
        if pod_id not in self._stopped:
            await self.stops.join(pod_id, lambda: self._stop(pod_id))

    def forget(self, pod_id: PodId) -> None:
        """The pod is gone."""
        self._stopped.discard(pod_id)

    async def _stop(self, pod_id: PodId) -> None:
        def not_ready(pod: PodRecord) -> PodRecord:
            return pod if pod.stopped_at else msgspec.structs.replace(pod, stopped_at=self.clock.now())

        pod = await self.store.pods.update(pod_id, not_ready)
        if pod is None:
            return
        await self._stop_containers(pod_id)
        await self.infra.remove(pod_id)
        await self.detach(pod)
        if self.node.root:
            async with self.locks.hold(pod_id):  # a creation that still mounts an image volume does so before
                await asyncio.to_thread(sandbox.release, self.layout, pod_id)
        self._stopped.add(pod_id)
        log.info("pod is stopped", pod=pod_id[:SHORT], name=pod.name)

    async def _stop_containers(self, pod_id: PodId) -> None:
        mine = [c for c in self.store.containers.values() if c.pod_id == pod_id and not c.infra]
        for container in mine:
            # A creation or start that is under way sees NOTREADY at its end; one that was faster is running now.
            async with self.locks.hold(container.id):
                pass
        results = await asyncio.gather(*(self.stop_container.stop(c.id, 0) for c in mine), return_exceptions=True)
        failures = [str(result) for result in results if isinstance(result, BaseException)]
        if failures:
            msg = f"cannot stop pod sandbox {pod_id[:SHORT]}: {'; '.join(failures)}"
            raise Internal(msg)
