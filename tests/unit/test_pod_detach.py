"""When the detaching of a pod is given up: by the number of failures and by their time. The plugin is never there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from cri_shim.adapters.network import Network
from cri_shim.adapters.store import Store
from cri_shim.flows import pod_detach
from cri_shim.flows.pod_detach import DetachPod
from cri_shim.model.clock import Clock
from cri_shim.model.errors import Internal
from cri_shim.model.ids import new_pod_id
from cri_shim.model.layout import Layout
from cri_shim.model.pod import PodName, PodRecord
from cri_shim.pb import api_pb2 as pb
from cri_shim.wire import cni

NETWORK = b'{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "gone"}]}'
GONE = "CNI plugin gone is not in"
SECOND = 1_000_000_000


@dataclass
class World:
    store: Store
    layout: Layout
    plugins: Path
    time: int = SECOND

    def flow(self) -> DetachPod:
        return DetachPod(self.store, self.layout, Network([], [self.plugins]), Clock(lambda: self.time))

    @property
    def pod(self) -> PodRecord:
        (pod,) = self.store.pods.values()
        return pod


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = Store.open(tmp_path / "state.db")
    pod = PodRecord(
        id=new_pod_id(),
        name=PodName("web"),
        config=pb.PodSandboxConfig().SerializeToString(),
        runtime_handler="",
        handler="crun",
        created_at=1,
        ips=("10.0.0.5", "fd00::5"),
        networked=True,
        attachment=cni.format_cached(cni.parse_network(NETWORK, "x.conflist"), {}),
        problem="the node was rebooted",
    )
    await store.pods.put(pod)
    yield World(store, Layout(root=tmp_path / "root", state=tmp_path / "run"), tmp_path)
    store.close()


async def test_the_last_of_many_failures_succeeds_and_says_what_is_left(world: World) -> None:
    for _ in range(pod_detach.ATTEMPTS - 1):
        with pytest.raises(Internal, match=GONE):
            await world.flow()(world.pod)
        assert world.pod.networked
    await world.flow()(world.pod)
    assert not world.pod.networked
    assert world.pod.attachment is None
    for words in (
        "the node was rebooted; its network was given up after 5 attempts in 0 s: ",
        GONE,
        "may be left behind: the lease of 10.0.0.5 and fd00::5",
        world.pod.id,
    ):
        assert words in world.pod.problem


async def test_a_failure_long_after_the_first_is_the_last(world: World) -> None:
    with pytest.raises(Internal):
        await world.flow()(world.pod)
    world.time += (pod_detach.SECONDS - 1) * SECOND
    with pytest.raises(Internal):
        await world.flow()(world.pod)
    world.time += SECOND
    await world.flow()(world.pod)
    assert "given up after 3 attempts in 60 s" in world.pod.problem


async def test_a_success_in_between_leaves_no_trace_of_the_failures(world: World) -> None:
    with pytest.raises(Internal):
        await world.flow()(world.pod)
    plugin = world.plugins / "gone"
    plugin.write_text("#!/bin/sh\nexit 0\n")
    plugin.chmod(0o755)
    before = world.pod
    await world.flow()(before)
    assert world.pod == msgspec.structs.replace(
        before, networked=False, attachment=None, detach_failures=0, detach_failed_at=0
    )


async def test_what_is_detached_is_not_detached_again(world: World) -> None:
    detached = await world.store.pods.update(
        world.pod.id, lambda pod: msgspec.structs.replace(pod, networked=False, attachment=None)
    )
    assert detached is not None
    await world.flow()(detached)
    assert world.pod == detached
