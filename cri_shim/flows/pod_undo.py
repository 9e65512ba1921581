"""The undoing of a pod that was not finished, from its record alone: after a crash, or where a first undo failed.

Invariant: afterwards the record is gone, or the pod is NOTREADY with its problem, for the client to remove.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec

from cri_shim.adapters import sandbox
from cri_shim.adapters.network import Network
from cri_shim.adapters.store import Store
from cri_shim.flows.attachment import attachment
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.infra import Infra
from cri_shim.log import get_logger
from cri_shim.model.clock import Clock
from cri_shim.model.errors import CriShimError
from cri_shim.model.ids import SHORT, PodId
from cri_shim.model.layout import Layout
from cri_shim.model.pod import PodState
from cri_shim.pb import api_pb2 as pb

log = get_logger()


@dataclass(slots=True)
class UndoPod:
    """The flow. Concurrent calls for one pod share one run."""

    store: Store
    layout: Layout
    network: Network
    infra: Infra
    clock: Clock
    runs: InFlight[PodId, None] = field(default_factory=InFlight)

    async def __call__(self, pod_id: PodId) -> None:
        """Undo a PENDING pod; any other is left as it is. Raises when its record cannot be written."""
        await self.runs.join(pod_id, lambda: self._undo(pod_id))

    async def _undo(self, pod_id: PodId) -> None:
        pod = self.store.pods.get(pod_id)
        if pod is None or pod.state is not PodState.PENDING:
            return
        config = pb.PodSandboxConfig.FromString(pod.config)
        try:
            await self.infra.remove(pod_id)
            if pod.networked:
                await self.network.delete(attachment(pod_id, config, self.layout), pod.attachment)
            await asyncio.to_thread(sandbox.remove, self.layout, pod_id)
        except (CriShimError, OSError) as error:
            await self.not_ready(pod_id, f"cannot be undone: {error}")
            return
        await self.store.pods.delete(pod_id)

    async def not_ready(self, pod_id: PodId, problem: str) -> None:
        """Show the pod to clients, as one that they have to remove."""
        log.warning("pod is not ready", pod=pod_id[:SHORT], problem=problem)
        await self.store.pods.update(
            pod_id, lambda pod: msgspec.structs.replace(pod, stopped_at=self.clock.now(), problem=problem)
        )
