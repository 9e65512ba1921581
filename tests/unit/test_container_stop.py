"""The stop state machine, against a handler whose container ends when it is told to."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from cri_shim.adapters.store import Store
from cri_shim.flows import container_stop
from cri_shim.flows.container_stop import StopContainer
from cri_shim.flows.exits import Exits
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.later import Later
from cri_shim.model.container import ContainerName, ContainerRecord, ContainerState, Exit, Reason
from cri_shim.model.errors import DeadlineExceeded
from cri_shim.model.handler import Handler
from cri_shim.model.ids import ContainerId, ImageId, PodId, new_container_id
from cri_shim.pb import api_pb2 as pb


@dataclass
class Obedient:
    """Records signals; ends on those it obeys."""

    exits: Exits
    obeys: frozenset[int]
    signals: list[tuple[int, bool]] = field(default_factory=list)

    async def kill(self, container_id: ContainerId, number: int, *, everyone: bool = False) -> None:
        self.signals.append((number, everyone))
        if number in self.obeys:
            self.exits.exited(container_id, Exit(code=128 + number, at=5, reason=Reason.ERROR))


@dataclass
class World:
    store: Store
    exits: Exits
    record: ContainerRecord

    def flow(self, *obeys: int) -> tuple[StopContainer, Obedient]:
        handler = Obedient(self.exits, frozenset(obeys))
        live = {"h": cast("Handler", handler)}
        return StopContainer(self.store, Handlers(live, {}, "h"), self.exits), handler

    @property
    def state(self) -> ContainerState:
        record = self.store.containers.get(self.record.id)
        assert record is not None
        return record.state


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = Store.open(tmp_path / "state.db")
    record = ContainerRecord(
        id=new_container_id(),
        pod_id=PodId("p"),
        name=ContainerName("c"),
        config=b"",
        handler="h",
        image_id=ImageId("sha256:0"),
        image_ref="",
        image_name="i",
        created_at=1,
        committed=True,
        started_at=2,
    )
    await store.containers.put(record)
    yield World(store, Exits(store, Later()), record)
    store.close()


async def test_the_stop_signal_is_enough(world: World) -> None:
    stop, handler = world.flow(signal.SIGTERM)
    await stop.stop(world.record.id, 30)
    assert handler.signals == [(signal.SIGTERM, False)]
    assert world.state is ContainerState.EXITED


async def test_no_grace_means_sigkill_to_everyone(world: World) -> None:
    stop, handler = world.flow(signal.SIGKILL)
    await stop.stop(world.record.id, 0)
    assert handler.signals == [(signal.SIGKILL, True)]


async def test_sigkill_follows_when_the_grace_is_over(world: World) -> None:
    stop, handler = world.flow(signal.SIGKILL)
    await stop.stop(world.record.id, 0.05)
    assert handler.signals == [(signal.SIGTERM, False), (signal.SIGKILL, True)]


async def test_a_later_call_shortens_the_wait_and_sends_no_second_signal(world: World) -> None:
    stop, handler = world.flow(signal.SIGKILL)
    first = asyncio.create_task(stop.stop(world.record.id, 60))
    await asyncio.sleep(0.02)
    await asyncio.wait_for(stop.stop(world.record.id, 0.05), 60)
    await asyncio.wait_for(first, 60)
    assert handler.signals == [(signal.SIGTERM, False), (signal.SIGKILL, True)]


async def test_a_later_call_never_lengthens_the_wait(world: World) -> None:
    stop, _ = world.flow(signal.SIGKILL)
    first = asyncio.create_task(stop.stop(world.record.id, 0.05))
    await asyncio.sleep(0.01)
    await asyncio.wait_for(stop.stop(world.record.id, 60), 30)
    await first


async def test_a_caller_that_leaves_does_not_stop_the_stop(world: World) -> None:
    stop, _ = world.flow(signal.SIGKILL)
    caller = asyncio.create_task(stop.stop(world.record.id, 0.05))
    await asyncio.sleep(0.01)
    caller.cancel()
    assert await world.exits.wait(world.record.id, 60)


async def test_an_undying_container_is_an_error_and_the_next_call_tries_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_stop, "KILL_SECONDS", 0.05)
    stop, handler = world.flow()
    with pytest.raises(DeadlineExceeded, match="after SIGKILL"):
        await stop.stop(world.record.id, 0)
    handler.obeys = frozenset({signal.SIGKILL})
    await stop.stop(world.record.id, 0)
    assert world.state is ContainerState.EXITED


async def test_unknown_and_ended_containers_are_success(world: World) -> None:
    stop, handler = world.flow(signal.SIGTERM)
    await stop(pb.StopContainerRequest(container_id="ff" * 32, timeout=1))
    await world.exits.record(world.record.id, Exit(code=0, at=9, reason=Reason.COMPLETED))
    await stop(pb.StopContainerRequest(container_id=world.record.id, timeout=1))
    assert handler.signals == []


async def test_the_first_exit_stays(world: World) -> None:
    await world.exits.record(world.record.id, Exit(code=137, at=9, reason=Reason.OOM_KILLED))
    await world.exits.record(world.record.id, Exit(code=255, at=10, reason=Reason.UNKNOWN))
    record = world.store.containers.get(world.record.id)
    assert record is not None
    assert record.exit == Exit(code=137, at=9, reason=Reason.OOM_KILLED)
