"""A database that cannot be written for a while: what could not be recorded is recorded as soon as it can be."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cri_shim.adapters import sandbox
from cri_shim.adapters.store import Store, Table
from cri_shim.flows import later
from cri_shim.flows.exits import Exits
from cri_shim.model.container import ContainerName, ContainerRecord, Exit, Reason
from cri_shim.model.errors import FailedPrecondition, ResourceExhausted
from cri_shim.model.ids import ImageId, new_container_id, new_pod_id
from cri_shim.pb import api_pb2 as pb
from tests.support.cri import pod_config
from tests.support.wired import wired


class Disk:
    """Stands between the tables and the database."""

    full = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        write = Table._write

        async def guarded(table: Table, key: str, record: object, **how: bool) -> None:  # type: ignore[type-arg]
            if self.full:
                msg = "cannot write the database: disk I/O error"
                raise ResourceExhausted(msg)
            await write(table, key, record, **how)

        monkeypatch.setattr(Table, "_write", guarded)
        monkeypatch.setattr(later, "FIRST_SECONDS", 0.01)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("repeated", [True, False])
async def test_a_pod_that_could_not_be_undone_does_not_keep_its_name(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, repeated: bool
) -> None:
    make = sandbox.make

    def fail(*_args: object, **_options: object) -> None:
        disk.full = True
        msg = "no such thing"
        raise FailedPrecondition(msg)

    request = pb.RunPodSandboxRequest(config=pod_config(network=pb.NODE))
    async with wired(tmp_path) as flows:
        run, listed = flows.runtime["RunPodSandbox"], flows.runtime["ListPodSandbox"]
        pods = flows.exits._store.pods
        monkeypatch.setattr(sandbox, "make", fail)
        with pytest.raises(FailedPrecondition, match="no such thing"):
            await run(request)
        assert len(pods.keys()) == 1
        assert await listed(pb.ListPodSandboxRequest()) == pb.ListPodSandboxResponse()
        monkeypatch.setattr(sandbox, "make", make)
        with pytest.raises(ResourceExhausted):
            await run(request)
        disk.full = False
        if repeated:
            await run(request)
            (pod,) = (await listed(pb.ListPodSandboxRequest())).items  # type: ignore[attr-defined]
            assert pod.state == pb.SANDBOX_READY
        else:
            async with asyncio.timeout(10):
                while pods.keys():
                    await asyncio.sleep(0.01)


async def test_an_exit_is_told_as_soon_as_it_can_be_written(tmp_path: Path, disk: Disk) -> None:
    store, again = Store.open(tmp_path / "state.db"), later.Later()
    exits = Exits(store, again)
    record = ContainerRecord(
        id=new_container_id(),
        pod_id=new_pod_id(),
        name=ContainerName("main"),
        config=b"",
        image_id=ImageId("sha256:" + "a" * 64),
        image_ref="",
        image_name="",
        created_at=1,
    )
    await store.containers.put(record)
    disk.full = True
    await exits.record(record.id, Exit(code=3, at=2, reason=Reason.ERROR))
    assert not await exits.wait(record.id, 0.05)
    disk.full = False
    assert await exits.wait(record.id, 10)
    ended = store.containers.get(record.id)
    assert ended is not None
    assert ended.exit == Exit(code=3, at=2, reason=Reason.ERROR)
    await again.aclose()
    store.close()
