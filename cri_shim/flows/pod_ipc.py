"""The IPC namespace and /dev/shm of a pod of modules: made with its first Linux container, as modules use neither.

All other pods have them from the start (`cri_shim.spec.pod.plan_sandbox`). Invariant: what was begun here goes with the
pod, and is completed by the next container that needs it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cri_shim.adapters import sandbox
from cri_shim.adapters.store import Store
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.locks import Locks
from cri_shim.model.errors import WrongState
from cri_shim.model.handler import Kind, PodContext
from cri_shim.model.ids import SHORT
from cri_shim.model.pod import PodRecord, PodState


@dataclass(frozen=True, slots=True)
class PodIpc:
    """Makes it. The lock is that of the pod: a stop of the pod excludes it."""

    store: Store
    handlers: Handlers
    locks: Locks

    async def ensure(self, pod: PodRecord, context: PodContext) -> None:
        """To be called for every Linux container, whose record is in the store; there already = success."""
        if self._runs_linux(pod.handler):
            return
        async with self.locks.hold(pod.id):
            now = self.store.pods.get(pod.id)
            if now is None or now.state is not PodState.READY:
                msg = f"pod sandbox {pod.id[:SHORT]} was stopped while the container was being made"
                raise WrongState(msg)
            await asyncio.to_thread(sandbox.make_ipc, context)

    def is_needed(self, pod: PodRecord) -> bool:
        """Whether the pod has to have them by now."""
        mine = (container.handler for container in self.store.containers.values() if container.pod_id == pod.id)
        return any(map(self._runs_linux, (pod.handler, *mine)))

    def _runs_linux(self, handler: str) -> bool:
        rules = self.handlers.rules.get(handler)
        return rules is not None and rules.kind is Kind.LINUX
