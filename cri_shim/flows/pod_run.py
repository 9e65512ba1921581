"""RunPodSandbox: name, record, files and namespaces, network, shared PID namespace, READY.

Not the containers. Invariant: the record is there before the first side effect; a failure undoes every step, and where
an undo step fails the pod stays, NOTREADY, for the client to remove.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec

from cri_shim.adapters import sandbox
from cri_shim.adapters.network import Network
from cri_shim.adapters.store import Store
from cri_shim.adapters.user_namespaces import UserNamespaces
from cri_shim.flows.attachment import attachment
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.infra import Infra
from cri_shim.flows.later import Later
from cri_shim.flows.pod_undo import UndoPod
from cri_shim.flows.undo import Undo
from cri_shim.log import get_logger
from cri_shim.model.clock import Clock
from cri_shim.model.errors import AlreadyExists, CriShimError
from cri_shim.model.handler import Kind
from cri_shim.model.ids import SHORT, PodId, new_pod_id
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.model.pod import PodName, PodRecord, PodState
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import pod as spec
from cri_shim.spec.cgroup_plan import Driver, cgroups_path_for_spec
from cri_shim.spec.dispatch import HandlerRules
from cri_shim.spec.selinux import choose_level

log = get_logger()


@dataclass(slots=True)
class RunPod:
    """The flow. Equal requests for one name share one run, and find the pod that it made."""

    store: Store
    layout: Layout
    network: Network
    user_namespaces: UserNamespaces
    handlers: Handlers
    infra: Infra
    node: NodeFacts
    clock: Clock
    cgroup_driver: Driver
    undo_pod: UndoPod
    later: Later
    runs: InFlight[PodName, PodId] = field(default_factory=InFlight)

    async def __call__(self, request: pb.RunPodSandboxRequest) -> pb.RunPodSandboxResponse:
        """Run a pod, or return the id of the one that an equal request has made."""
        name = spec.pod_name(request.config)
        if self.runs.differs(name, request):
            msg = f"pod sandbox {name} is being made from a different request"
            raise AlreadyExists(msg)
        if name not in self.runs and (pod := await self._by_name(name)) is not None:
            return pb.RunPodSandboxResponse(pod_sandbox_id=_same(pod, request))
        rules = self.handlers.for_pod(request.runtime_handler)
        plan = spec.plan_sandbox(request.config, self.node, rules)
        if request.config.linux.cgroup_parent:
            cgroups_path_for_spec(request.config.linux.cgroup_parent, "check", self.cgroup_driver)
        if plan.user is not None:
            await self.handlers.require_user_namespaces(rules.name)
        pod_id = await self.runs.join(name, lambda: self._run(name, request, rules, plan), request)
        return pb.RunPodSandboxResponse(pod_sandbox_id=pod_id)

    async def _by_name(self, name: PodName) -> PodRecord | None:
        """The pod of that name; the name of one that could not be undone is free when that succeeds now."""
        pod = next((pod for pod in self.store.pods.values() if pod.name == name), None)
        if pod is None or pod.state is not PodState.PENDING:
            return pod
        await self.undo_pod(pod.id)
        return self.store.pods.get(pod.id)

    async def _run(
        self, name: PodName, request: pb.RunPodSandboxRequest, rules: HandlerRules, plan: spec.SandboxPlan
    ) -> PodId:
        pod_id = new_pod_id()
        record = PodRecord(
            id=pod_id,
            name=name,
            config=request.config.SerializeToString(),
            runtime_handler=request.runtime_handler,
            handler=rules.name,
            created_at=self.clock.now(),
            boot_id=self.node.boot_id,
            networked=plan.net,
            selinux_level=self._selinux_level(pod_id, request.config),
        )
        undo = Undo("run pod")
        try:
            async with undo:
                await self._make(record, request.config, rules, plan, undo)
        except BaseException as error:
            if undo.failures:
                await self._keep_broken(record.id, error, undo.failures)
            raise
        log.info("pod is ready", pod=record.id[:SHORT], name=name, handler=rules.name)
        return record.id

    async def _make(
        self, record: PodRecord, config: pb.PodSandboxConfig, rules: HandlerRules, plan: spec.SandboxPlan, undo: Undo
    ) -> None:
        pod_id = record.id
        await self.store.pods.put(record)
        undo.push("delete the record", lambda: self._forget(pod_id, undo))
        undo.push("remove files and namespaces", lambda: asyncio.to_thread(sandbox.remove, self.layout, pod_id))
        label = spec.selinux_label(config, self.node, record.selinux_level)
        await asyncio.to_thread(sandbox.make, self.layout, pod_id, plan, label, root=self.node.root)
        if plan.user is not None:
            await self.user_namespaces.pin(pod_id, plan, plan.user)
        ips: tuple[str, ...] = ()
        cached: bytes | None = None
        if plan.net:
            attach = attachment(pod_id, config, self.layout)
            undo.push("detach the network", lambda: self.network.delete(attach, cached))
            result = await self.network.add(attach)
            ips, cached = result.ips, result.raw
            await self.store.pods.update(pod_id, lambda pod: msgspec.structs.replace(pod, attachment=cached))
        if self.node.root and spec.shares_pid(config) and rules.kind is Kind.LINUX:
            undo.push("remove the infra container", lambda: self.infra.remove(pod_id))
            await self.infra.ensure(record, rules.name)
        await self.store.pods.update(
            pod_id, lambda pod: msgspec.structs.replace(pod, ips=ips, ready_at=self.clock.now())
        )

    def _selinux_level(self, pod_id: PodId, config: pb.PodSandboxConfig) -> str:
        if self.node.selinux_contexts is None:
            return ""
        used = {pod.selinux_level for pod in self.store.pods.values()}
        return choose_level(self.node.selinux_contexts, config.linux.security_context.selinux_options, pod_id, used)

    async def _forget(self, pod_id: PodId, undo: Undo) -> None:
        # The last step: the record may only go when everything it stands for is gone.
        if not undo.failures:
            await self.store.pods.delete(pod_id)

    async def _keep_broken(self, pod_id: PodId, error: BaseException, failures: list[str]) -> None:
        try:
            await self.undo_pod.not_ready(pod_id, f"{error}; and not undone: {'; '.join(failures)}")
        except CriShimError:
            # A record that cannot be written either: nobody sees this pod, so nobody would remove it.
            self.later.insist(f"undoing pod {pod_id[:SHORT]}", lambda: self.undo_pod(pod_id))


def _same(pod: PodRecord, request: pb.RunPodSandboxRequest) -> PodId:
    """The id, when the request repeats the one that made the pod and the pod still runs."""
    if pb.PodSandboxConfig.FromString(pod.config) != request.config:
        difference = "a different configuration"
    elif pod.runtime_handler != request.runtime_handler:
        difference = f"runtime handler {pod.runtime_handler!r}"
    elif pod.state is not PodState.READY:
        difference = f"state {pod.state.value}"
    else:
        return pod.id
    msg = f"pod sandbox {pod.name} exists with {difference}"
    raise AlreadyExists(msg, hint=f"remove pod sandbox {pod.id[:SHORT]} or use another attempt")
