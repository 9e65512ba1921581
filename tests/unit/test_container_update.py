"""The flow of an update, against a handler that records what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
import pytest

from cri_shim.adapters.store import Store
from cri_shim.flows.container_update import UpdateContainer
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.locks import Locks
from cri_shim.model.container import ContainerName, ContainerRecord, Exit, Reason
from cri_shim.model.errors import FailedPrecondition, InvalidArgument, NotFound
from cri_shim.model.handler import Handler
from cri_shim.model.ids import ContainerId, ImageId, PodId, new_container_id
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.container_request import current_resources

FIRST = pb.LinuxContainerResources(cpu_shares=512)


@dataclass
class Recording:
    """Takes every change but those to `refuses` shares."""

    refuses: int = 0
    told: list[tuple[int, int]] = field(default_factory=list)

    async def update(
        self, container_id: ContainerId, now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources
    ) -> None:
        del container_id
        self.told.append((now.cpu_shares, wanted.cpu_shares))
        if wanted.cpu_shares == self.refuses:
            raise FailedPrecondition("refused")


@dataclass
class World:
    store: Store
    record: ContainerRecord
    handler: Recording
    flow: UpdateContainer

    async def update(self, **fields: object) -> None:
        linux = pb.LinuxContainerResources(**fields)  # type: ignore[arg-type]
        await self.flow(pb.UpdateContainerResourcesRequest(container_id=self.record.id, linux=linux))

    @property
    def held(self) -> pb.LinuxContainerResources:
        record = self.store.containers.get(self.record.id)
        assert record is not None
        return current_resources(record)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = Store.open(tmp_path / "state.db")
    record = ContainerRecord(
        id=new_container_id(),
        pod_id=PodId("p"),
        name=ContainerName("c"),
        config=pb.ContainerConfig(linux=pb.LinuxContainerConfig(resources=FIRST)).SerializeToString(),
        handler="h",
        image_id=ImageId("sha256:0"),
        image_ref="",
        image_name="i",
        created_at=1,
        committed=True,
    )
    await store.containers.put(record)
    handler = Recording()
    handlers = Handlers({"h": cast("Handler", handler)}, {}, "h")
    yield World(store, record, handler, UpdateContainer(store, handlers, Locks(), InFlight()))
    store.close()


async def test_the_result_is_kept_and_the_request_stays(world: World) -> None:
    await world.update(cpu_shares=100)
    await world.update(cpu_period=1000)
    assert world.held == pb.LinuxContainerResources(cpu_shares=100, cpu_period=1000)
    assert world.handler.told == [(512, 100), (100, 100)]
    kept = world.store.containers.get(world.record.id)
    assert kept is not None
    assert kept.config == world.record.config
    await world.update(cpu_shares=100)
    assert len(world.handler.told) == 2


async def test_what_the_handler_refuses_is_not_kept(world: World) -> None:
    world.handler.refuses = 100
    with pytest.raises(FailedPrecondition, match="refused"):
        await world.update(cpu_shares=100)
    assert world.held == FIRST


async def test_what_cannot_be_kept_is_taken_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise FailedPrecondition("the disk is full")

    monkeypatch.setattr(world.store.containers, "update", fail)
    with pytest.raises(FailedPrecondition, match="disk is full"):
        await world.update(cpu_shares=100)
    assert world.handler.told == [(512, 100), (100, 512)]
    assert world.held == FIRST


async def test_of_an_ended_container_only_the_record_changes(world: World) -> None:
    ended = Exit(code=0, at=3, reason=Reason.COMPLETED)
    await world.store.containers.put(msgspec.structs.replace(world.record, started_at=2, exit=ended))
    await world.update(cpu_shares=100)
    assert (world.handler.told, world.held.cpu_shares) == ([], 100)


async def test_not_while_it_is_removed(world: World) -> None:
    leaves = asyncio.Event()
    removal = asyncio.create_task(world.flow.removals.join(world.record.id, lambda: _until(leaves)))
    await asyncio.sleep(0)
    with pytest.raises(FailedPrecondition, match="is being removed"):
        await world.update(cpu_shares=100)
    leaves.set()
    await removal
    assert world.handler.told == []


async def test_bad_requests_touch_nothing(world: World) -> None:
    with pytest.raises(InvalidArgument, match="cpu_shares"):
        await world.update(cpu_shares=1)
    with pytest.raises(InvalidArgument, match="memory_swap_limit"):
        await world.update(memory_limit_in_bytes=10, memory_swap_limit_in_bytes=5)
    windows = pb.WindowsContainerResources()
    with pytest.raises(InvalidArgument, match="windows"):
        await world.flow(pb.UpdateContainerResourcesRequest(container_id=world.record.id, windows=windows))
    with pytest.raises(NotFound):
        await world.flow(pb.UpdateContainerResourcesRequest(container_id="0" * 64))
    assert (world.handler.told, world.held) == ([], FIRST)


async def _until(event: asyncio.Event) -> None:
    await event.wait()
