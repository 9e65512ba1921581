"""RemovePodSandbox: stop, remove the containers, delete files and record. Idempotent; an unknown pod is success."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cri_shim.adapters import sandbox
from cri_shim.adapters.store import Store
from cri_shim.flows.container_remove import RemoveContainer
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.lookup import find_pod
from cri_shim.flows.pod_stop import StopPod
from cri_shim.log import get_logger
from cri_shim.model.ids import SHORT, PodId
from cri_shim.model.layout import Layout
from cri_shim.pb import api_pb2 as pb

log = get_logger()


@dataclass(slots=True)
class RemovePod:
    """The flow. Concurrent calls for one pod share one run."""

    store: Store
    layout: Layout
    stop_pod: StopPod
    remove_container: RemoveContainer
    removals: InFlight[PodId, None]

    async def __call__(self, request: pb.RemovePodSandboxRequest) -> pb.RemovePodSandboxResponse:
        """Remove a pod and everything in it."""
        pod = find_pod(self.store, request.pod_sandbox_id)
        if pod is not None:
            await self.removals.join(pod.id, lambda: self._remove(pod.id))
        return pb.RemovePodSandboxResponse()

    async def _remove(self, pod_id: PodId) -> None:
        await self.stop_pod.stop(pod_id)
        # No container can appear any more: creation checks the pod's state under the container's lock and at its end.
        while mine := [c.id for c in self.store.containers.values() if c.pod_id == pod_id]:
            await asyncio.gather(*(self.remove_container.remove(container_id) for container_id in mine))
        await asyncio.to_thread(sandbox.remove, self.layout, pod_id)
        await self.store.pods.delete(pod_id)
        self.stop_pod.forget(pod_id)
        log.info("pod is removed", pod=pod_id[:SHORT])
