"""ContainerStats, ListContainerStats, PodSandboxStats, ListPodSandboxStats.

Not the reading (`cri_shim.adapters.stats`). Invariant: a list never fails for one of its members; what goes while it is
made is left out.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cri_shim.adapters.layer_usage import LayerSizes
from cri_shim.adapters.stats import ContainerTarget, PodTarget, StatsReader
from cri_shim.adapters.store import Store
from cri_shim.flows.entries import Entries
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.lookup import existing_container, existing_pod
from cri_shim.model.container import ContainerRecord, ContainerState
from cri_shim.model.errors import InvalidArgument, NotReady
from cri_shim.model.handler import HandlerStats
from cri_shim.model.ids import SHORT, ContainerId, PodId
from cri_shim.model.layout import Layout
from cri_shim.model.pod import PodRecord, PodState
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.cgroup_plan import Driver, cgroup_dir, pod_dir
from cri_shim.spec.cgroup_stats import Reading, Usage, guest_usage
from cri_shim.spec.pod import host_network
from cri_shim.spec.stats_messages import container_stats, pod_stats


@dataclass(frozen=True, slots=True)
class _Pod:
    """A record with what follows from it. `cgroup_parent` is None when the cgroup driver was another one then."""

    record: PodRecord
    attributes: pb.PodSandboxAttributes
    cgroup_parent: str | None
    cgroup: str
    has_netns: bool


@dataclass(frozen=True, slots=True)
class _Container:
    """A record with what follows from it."""

    record: ContainerRecord
    attributes: pb.ContainerAttributes

    @property
    def runs(self) -> bool:
        return self.record.state is ContainerState.RUNNING


@dataclass(slots=True)
class Stats:
    """The flows, and the readings between calls that keep their figures fresh."""

    store: Store
    layout: Layout
    handlers: Handlers
    driver: Driver
    reader: StatsReader
    layers: LayerSizes
    missed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a call lacked a figure that is measured in the background."""
    _pods: Entries[PodRecord, _Pod] = field(init=False)
    _containers: Entries[ContainerRecord, _Container] = field(default_factory=lambda: Entries(_container))

    def __post_init__(self) -> None:
        self._pods = Entries(lambda record: _pod(record, self.driver))

    async def container(self, request: pb.ContainerStatsRequest) -> pb.ContainerStatsResponse:
        """One container; NotFound when there is none."""
        record = existing_container(self.store, request.container_id)
        (stats,) = await self._measure([_container(record)])
        existing_container(self.store, record.id)
        return pb.ContainerStatsResponse(stats=stats)

    async def list_containers(self, request: pb.ListContainerStatsRequest) -> pb.ListContainerStatsResponse:
        """All containers that match every given field of the filter; one that does not run has attributes only."""
        visible = (each for each in self._made() if not each.record.infra)
        found = await self._measure([each for each in visible if _container_matches(each, request.filter)])
        return pb.ListContainerStatsResponse(
            stats=[stats for stats in found if self.store.containers.get(ContainerId(stats.attributes.id)) is not None]
        )

    async def pod(self, request: pb.PodSandboxStatsRequest) -> pb.PodSandboxStatsResponse:
        """One pod; NotFound when there is none, Unavailable when it is not ready."""
        record = existing_pod(self.store, request.pod_sandbox_id)
        if record.state is not PodState.READY:
            msg = f"pod sandbox {record.id[:SHORT]} is not ready: there is nothing to measure"
            raise NotReady(msg)
        (stats,) = await self._measure_pods([_pod(record, self.driver)])
        existing_pod(self.store, record.id)
        return pb.PodSandboxStatsResponse(stats=stats)

    async def list_pods(self, request: pb.ListPodSandboxStatsRequest) -> pb.ListPodSandboxStatsResponse:
        """All ready pods that match every given field of the filter."""
        found = await self._measure_pods([pod for pod in self._ready() if _pod_matches(pod, request.filter)])
        return pb.ListPodSandboxStatsResponse(
            stats=[stats for stats in found if self.store.pods.get(PodId(stats.attributes.id)) is not None]
        )

    async def refresh(self) -> None:
        """Read everything once, for the rates of later calls, and measure the writable layers that are due."""
        self.missed.clear()
        running = [record.id for record in self.store.containers.values() if record.state is ContainerState.RUNNING]
        pods = self._ready()
        self.reader.keep(running, [pod.record.id for pod in pods])
        if running:
            await asyncio.to_thread(self.reader.pods, self._pod_targets(pods, self._members(), with_network=False))
        await self.layers.measure(running, self._resting())

    def _resting(self) -> dict[ContainerId, int]:
        """Containers that write no more, and since when."""
        return {
            record.id: record.exit.at if record.exit is not None else record.created_at
            for record in self.store.containers.values()
            if record.state in {ContainerState.CREATED, ContainerState.EXITED}
        }

    def _ready(self) -> list[_Pod]:
        return [pod for pod in self._pods.of(self.store.pods.values()) if pod.record.state is PodState.READY]

    def _made(self) -> list[_Container]:
        """All containers but those that are still being made."""
        records = (each for each in self.store.containers.values() if each.state is not ContainerState.PENDING)
        return self._containers.of(records)

    async def _measure(self, containers: Sequence[_Container]) -> list[pb.ContainerStats]:
        pods = {pod.record.id: pod for pod in self._pods.of(self.store.pods.values())}
        targets = [self._target(each.record, pods.get(each.record.pod_id)) for each in containers]
        self._miss_layers(containers)

        def read() -> list[pb.ContainerStats]:
            return self._messages(containers, self.reader.containers(targets))

        return await asyncio.to_thread(read)

    async def _measure_pods(self, pods: Sequence[_Pod]) -> list[pb.PodSandboxStats]:
        members = self._members()
        targets = self._pod_targets(pods, members, with_network=True)
        for pod in pods:
            self._miss_layers(members.get(pod.record.id, ()))

        def read() -> list[pb.PodSandboxStats]:
            return [
                pod_stats(pod.attributes, reading, self._messages(members.get(pod.record.id, ()), readings))
                for pod, (reading, readings) in zip(pods, self.reader.pods(targets), strict=True)
            ]

        return await asyncio.to_thread(read)

    def _members(self) -> dict[PodId, list[_Container]]:
        """The containers of each pod, the pod's own among them."""
        members: dict[PodId, list[_Container]] = {}
        for each in self._made():
            members.setdefault(each.record.pod_id, []).append(each)
        return members

    def _pod_targets(
        self, pods: Iterable[_Pod], members: Mapping[PodId, Sequence[_Container]], *, with_network: bool
    ) -> list[PodTarget]:
        return [
            PodTarget(
                id=pod.record.id,
                cgroup=pod.cgroup,
                netns=self._netns(pod) if with_network else None,
                containers=tuple(self._target(each.record, pod) for each in members.get(pod.record.id, ())),
            )
            for pod in pods
        ]

    def _netns(self, pod: _Pod) -> Path | None:
        return self.layout.namespace(pod.record.id, "net") if pod.has_netns else None

    def _target(self, record: ContainerRecord, pod: _Pod | None) -> ContainerTarget:
        handler = self.handlers.live.get(record.handler)
        own = handler.stats(record.id) if handler is not None else None
        if own is not None:
            return ContainerTarget(record.id, "", functools.partial(_guest_usage, own))
        if pod is None or pod.cgroup_parent is None or record.state is not ContainerState.RUNNING:
            return ContainerTarget(record.id, "")
        return ContainerTarget(record.id, cgroup_dir(pod.cgroup_parent, record.id, self.driver))

    def _messages(
        self, containers: Sequence[_Container], readings: Sequence[Reading | None]
    ) -> list[pb.ContainerStats]:
        mountpoint = str(self.layout.root)
        return [
            container_stats(
                each.attributes, reading if each.runs else None, self.layers.latest(each.record.id), mountpoint
            )
            for each, reading in zip(containers, readings, strict=True)
            if not each.record.infra
        ]

    def _miss_layers(self, containers: Iterable[_Container]) -> None:
        if any(each.runs and self.layers.latest(each.record.id) is None for each in containers):
            self.missed.set()


def _guest_usage(own: HandlerStats) -> Usage:
    return guest_usage(own.cpu_ns, own.memory, own.resident(), own.memory_limit)


def _container(record: ContainerRecord) -> _Container:
    config = pb.ContainerConfig.FromString(record.config)
    attributes = pb.ContainerAttributes(
        id=record.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
    )
    return _Container(record, attributes)


def _pod(record: PodRecord, driver: Driver) -> _Pod:
    config = pb.PodSandboxConfig.FromString(record.config)
    attributes = pb.PodSandboxAttributes(
        id=record.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
    )
    parent: str | None = config.linux.cgroup_parent
    try:
        cgroup = pod_dir(config.linux.cgroup_parent, driver)
    except InvalidArgument:
        parent, cgroup = None, ""
    return _Pod(record, attributes, parent, cgroup, not host_network(config))


def _container_matches(container: _Container, wanted: pb.ContainerStatsFilter) -> bool:
    record, labels = container.record, container.attributes.labels
    return (
        record.id.startswith(wanted.id)
        and record.pod_id.startswith(wanted.pod_sandbox_id)
        and all(labels.get(key) == value for key, value in wanted.label_selector.items())
    )


def _pod_matches(pod: _Pod, wanted: pb.PodSandboxStatsFilter) -> bool:
    labels = pod.attributes.labels
    return pod.record.id.startswith(wanted.id) and all(
        labels.get(key) == value for key, value in wanted.label_selector.items()
    )
