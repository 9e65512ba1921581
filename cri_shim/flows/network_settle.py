"""What CNI plugins are asked after recovery: to remove what belongs to no pod (GC), to look at what does (CHECK).

Nothing here fails the start: networks that are not as they should be are logged, and pods go on. Invariant: GC runs
while nothing is attached or detached, so before the first request; CHECK, which only looks, in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from cri_shim.adapters.network import Network
from cri_shim.adapters.store import Store
from cri_shim.flows.attachment import attachment
from cri_shim.log import get_logger
from cri_shim.model.errors import CriShimError
from cri_shim.model.ids import SHORT
from cri_shim.model.layout import Layout
from cri_shim.model.pod import PodRecord, PodState
from cri_shim.pb import api_pb2 as pb

GC_SECONDS = 10.0
"""How long the start of the daemon waits for all plugins together."""

log = get_logger()


@dataclass(slots=True)
class SettleNetworks:
    """The flow, once for each start of the daemon."""

    store: Store
    layout: Layout
    network: Network
    check: bool
    """Whether the administrator wants CHECK: on a large node it is many processes at once."""
    _checks: asyncio.Task[None] | None = field(default=None)

    async def run(self) -> None:
        """Collect garbage, then begin to check. Every pod that is left has a record by now."""
        await self._collect_garbage()
        if self.check:
            self._checks = asyncio.create_task(self._check_all())

    async def aclose(self) -> None:
        """Check no more."""
        if self._checks is not None:
            self._checks.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._checks

    async def _collect_garbage(self) -> None:
        # A pod that could not be detached yet still has what its DEL needs.
        attached = [(pod.id, pod.attachment) for pod in self.store.pods.values() if pod.networked]
        try:
            async with asyncio.timeout(GC_SECONDS):
                collected = await self.network.collect_garbage(attached)
        except (CriShimError, OSError) as error:
            log.warning("the network's garbage is not collected", error=str(error) or f"no end after {GC_SECONDS:g} s")
        else:
            if collected:
                log.info("the network's plugins removed what belongs to no pod", pods=len(attached))

    async def _check_all(self) -> None:
        for pod in [pod for pod in self.store.pods.values() if pod.state is PodState.READY and pod.networked]:
            await self._check(pod)

    async def _check(self, pod: PodRecord) -> None:
        config = pb.PodSandboxConfig.FromString(pod.config)
        try:
            if pod.attachment is not None:
                await self.network.check(attachment(pod.id, config, self.layout), pod.attachment)
        except (CriShimError, OSError) as error:
            now = self.store.pods.get(pod.id)
            if now is not None and now.state is PodState.READY:  # or it was stopped meanwhile
                log.warning("the pod's network is not as it was made", pod=pod.id[:SHORT], error=str(error))
