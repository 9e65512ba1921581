"""Attach to modules in the daemon and in workers; the client is in memory. In the daemon it needs no root."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cri_shim.flows import attach
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import ContainerPlan
from tests.contract.handler_suite import until
from tests.contract.wasm_bench import WasmBench, wasm_bench, worker_bench
from tests.support import leftovers, wasm
from tests.support.client import MemoryClient

MEGABYTE = os.urandom(1 << 20)


@pytest.fixture(params=["in-process", pytest.param("process", marks=pytest.mark.root)])
async def bench(
    request: pytest.FixtureRequest, module_root: Path, tmp_path: Path, run_name: str
) -> AsyncIterator[WasmBench]:
    if request.param == "process":
        parent = f"/{leftovers.CGROUP_PREFIX}{run_name}/attach"
        async with worker_bench(module_root, tmp_path / "state", parent) as made:
            yield made
    else:
        async with wasm_bench(module_root, tmp_path / "state") as made:
            yield made


async def begin(bench: WasmBench, text: str, **config: Any) -> ContainerPlan:
    plan = await bench.begin(bench.artifact(text, **config))
    await bench.said(plan, "ready")
    return plan


def join(bench: WasmBench, plan: ContainerPlan, client: MemoryClient) -> asyncio.Task[int]:
    async def session() -> int:
        async with asyncio.timeout(60):
            return await attach.serve(bench.handler, plan.id, client)

    return asyncio.ensure_future(session())


async def test_input_and_output_until_the_end(bench: WasmBench) -> None:
    plan = await begin(bench, wasm.CAT, stdin=True, stdin_once=True)
    client, onlooker = MemoryClient(stdin=True, stderr=True), MemoryClient()
    sessions = [join(bench, plan, onlooker), join(bench, plan, client)]
    await asyncio.gather(onlooker.joined.wait(), client.joined.wait())
    client.keys.type(MEGABYTE)
    client.keys.end()
    assert await asyncio.gather(*sessions) == [0, 0]
    for seen in (client, onlooker):
        assert hashlib.sha256(seen.out.data).digest() == hashlib.sha256(MEGABYTE).digest()
    assert client.err.data == b"ready\n"
    assert (await bench.end_of(plan)).code == 0


async def test_leaving_changes_nothing(bench: WasmBench) -> None:
    plan = await begin(bench, wasm.CAT, stdin=True)
    for word in (b"one\n", b"two\n"):
        client = MemoryClient(stdin=True)
        session = join(bench, plan, client)
        client.keys.type(word)
        await client.out.shows(word)
        client.keys.end()
        client.leave()
        assert await session == 0
    assert plan.id not in bench.ends
    assert bench.text(plan) == ["ready", "one", "two"]


async def test_stdin_once_ends_when_the_client_vanishes(bench: WasmBench) -> None:
    plan = await begin(bench, wasm.CAT, stdin=True, stdin_once=True)
    client = MemoryClient(stdin=True)
    session = join(bench, plan, client)
    client.keys.type(b"it\n")
    await client.out.shows(b"it\n")
    client.leave()
    await session
    assert (await bench.end_of(plan)).code == 0


async def test_a_signal_ends_a_module_that_waits_for_input(bench: WasmBench) -> None:
    plan = await begin(bench, wasm.CAT, stdin=True)
    client = MemoryClient(stdin=True)
    session = join(bench, plan, client)
    await client.joined.wait()
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143
    assert await session == 0


async def test_a_client_that_takes_nothing_stops_the_output_and_is_sent_away(
    bench: WasmBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "STALL_SECONDS", 0.3)
    plan = await begin(bench, wasm.CAT, stdin=True, stdin_once=True)
    slow, writer = MemoryClient(), MemoryClient(stdin=True)
    slow.out.room.clear()
    sessions = [join(bench, plan, slow), join(bench, plan, writer)]
    await asyncio.gather(slow.joined.wait(), writer.joined.wait())
    writer.keys.type(MEGABYTE)
    await asyncio.sleep(0.1)
    assert len(writer.out.data) < len(MEGABYTE)
    with pytest.raises(FailedPrecondition, match="read nothing"):
        await sessions[0]
    await until(lambda: len(writer.out.data) == len(MEGABYTE))
    writer.leave()
    assert await sessions[1] == 0


async def test_a_module_without_input_and_one_that_has_ended(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.STDIN)
    await bench.finish(plan)
    with pytest.raises(FailedPrecondition, match="not running"):
        await join(bench, plan, MemoryClient())


async def test_nothing_is_left(bench: WasmBench) -> None:
    plan = await begin(bench, wasm.CAT, stdin=True)
    descriptors = len(os.listdir("/proc/self/fd"))
    for stdin in (False, True):
        client = MemoryClient(stdin=stdin)
        session = join(bench, plan, client)
        await client.joined.wait()
        client.leave()
        await session
    pump_notices = b"a write finds that a client has gone\n"
    client = MemoryClient(stdin=True)
    session = join(bench, plan, client)
    client.keys.type(pump_notices)
    await client.out.shows(pump_notices)
    client.leave()
    await session
    client = MemoryClient(stdin=True)
    session = join(bench, plan, client)
    client.keys.type(pump_notices)
    await client.out.shows(pump_notices)
    client.leave()
    await session
    await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 1)  # the last one's, until the next write
