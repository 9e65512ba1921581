"""UpdatePodSandboxResources: the kubelet tells how it has sized the pod.

Not a change of any cgroup: the pod's own belongs to the kubelet, which has resized it before it calls. Invariant: the
containers that are made from now on are made for the pod as it is now.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cri_shim.adapters.store import Store
from cri_shim.flows.lookup import existing_pod
from cri_shim.model.pod import PodRecord
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.resources import check


@dataclass(slots=True)
class UpdatePod:
    """The flow."""

    store: Store

    async def __call__(self, request: pb.UpdatePodSandboxResourcesRequest) -> pb.UpdatePodSandboxResourcesResponse:
        """Keep what is said; what is not said stays."""
        pod = existing_pod(self.store, request.pod_sandbox_id)
        for given in (request.overhead, request.resources):
            check(given)
        await self.store.pods.update(pod.id, lambda old: _with(old, request))
        return pb.UpdatePodSandboxResourcesResponse()


def _with(pod: PodRecord, request: pb.UpdatePodSandboxResourcesRequest) -> PodRecord:
    said = {
        field: getattr(request, field).SerializeToString()
        for field in ("overhead", "resources")
        if request.HasField(field)
    }
    return msgspec.structs.replace(pod, **said)
