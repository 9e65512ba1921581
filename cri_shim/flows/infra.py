"""The pod's own container: it holds the PID namespace of a pod that shares one, and reaps orphans in it.

Not a pause container: pods that do not share a PID namespace have none. Invariant: it is an OCI container like any
other, with a record of its own whose id is the pod's, so recovery and removal need no second way.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cri_shim.adapters import sandbox
from cri_shim.adapters.store import Store
from cri_shim.flows.container_remove import discard
from cri_shim.flows.container_start import with_start
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.locks import Locks
from cri_shim.model.clock import Clock
from cri_shim.model.container import ContainerName, ContainerRecord
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import ContainerPlan
from cri_shim.model.ids import ContainerId, ImageId, PodId
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.model.pod import PodRecord
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import infra as spec
from cri_shim.spec.pod import context


@dataclass(slots=True)
class Infra:
    """Makes and removes infra containers."""

    store: Store
    layout: Layout
    handlers: Handlers
    node: NodeFacts
    locks: Locks
    clock: Clock
    program: Path | None
    """The init of a shared PID namespace, a static binary; None = the node has none."""

    def pid(self, pod_id: PodId) -> int:
        """The first process of the shared namespace, 0 where there is none."""
        record = self.store.containers.get(ContainerId(pod_id))
        return record.pid if record is not None else 0

    async def ensure(self, pod: PodRecord, handler_name: str) -> None:
        """Make, start and pin, unless it is there. On error the caller's undo calls `remove`."""
        container_id = ContainerId(pod.id)
        async with self.locks.hold(container_id):
            if self.store.containers.get(container_id) is not None:
                return
            record = ContainerRecord(
                id=container_id,
                pod_id=pod.id,
                name=ContainerName(f"infra_{pod.name}"),
                config=b"",
                handler=handler_name,
                image_id=ImageId(""),
                image_ref="",
                image_name="",
                created_at=self.clock.now(),
                infra=True,
            )
            await self.store.containers.put(record)
            handler = self.handlers.get(handler_name)
            plan = self.plan(pod)
            await asyncio.to_thread(sandbox.make_infra_root, self.layout, plan.pod)
            await handler.create(plan)
            started = await handler.start(container_id)
            await asyncio.to_thread(sandbox.pin_pid_namespace, self.layout, pod.id, started.pid)
            await self.store.containers.update(
                container_id, lambda old: msgspec.structs.replace(with_start(old, started), committed=True)
            )

    def plan(self, pod: PodRecord) -> ContainerPlan:
        """What the handler creates and adopts."""
        if self.program is None:
            msg = "a shared PID namespace needs catatonit, which is not installed"
            raise FailedPrecondition(msg, hint="install it, or ask for pid: CONTAINER")
        config = pb.PodSandboxConfig.FromString(pod.config)
        return spec.plan(context(pod.id, config, self.layout, self.node, pod.selinux_level), self.layout, self.program)

    async def remove(self, pod_id: PodId) -> None:
        """Kill and remove; none = success."""
        container_id = ContainerId(pod_id)
        async with self.locks.hold(container_id):
            record = self.store.containers.get(container_id)
            if record is None:
                return
            await discard(self.store, self.layout, self.handlers, record)
            await self.store.containers.delete(container_id)
