"""Modules that listen: an unmodified Go web server for WASI preview 1, in the daemon and in a worker."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import http.client
import random
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cri_shim.kernel import namespaces
from cri_shim.model.errors import CriShimError, FailedPrecondition, InvalidArgument
from cri_shim.model.handler import ContainerPlan
from tests.contract.wasm_bench import WasmBench, mount, wasm_bench, worker_bench
from tests.support import go_guests, leftovers, wasm

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(go_guests.program() is None, reason="needs Go (https://go.dev) to build its guest"),
]

KEY = "cri-shim.io/listen"


@pytest.fixture(params=["in-process", "process"])
async def bench(
    request: pytest.FixtureRequest, module_root: Path, tmp_path: Path, run_name: str
) -> AsyncIterator[WasmBench]:
    parent = f"/{leftovers.CGROUP_PREFIX}{run_name}/listener"
    state = tmp_path / "state"
    making = (
        wasm_bench(module_root, state) if request.param == "in-process" else worker_bench(module_root, state, parent)
    )
    async with making as made:
        yield made


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


async def get(port: int, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    def ask() -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("GET" if body is None else "POST", path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()

    return await asyncio.to_thread(ask)


async def serving(bench: WasmBench, plan: ContainerPlan) -> ContainerPlan:
    await bench.handler.create(plan)
    await bench.handler.start(plan.id)
    await bench.said(plan, "serving")
    return plan


async def test_a_stock_go_server_serves_and_stops_at_once(bench: WasmBench, go_server: bytes, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "page").write_text("from a volume\n")
    volume = mount(tmp_path, "/srv", readonly=True)
    plan = await serving(bench, bench.artifact(go_server, annotations={KEY: str(port)}, mounts=[volume]))
    assert await get(port, "/x") == (200, b"hello /x\n")
    # The descriptors behind the listener are what they were, and calls on them go to the engine.
    assert await get(port, "/file?name=/srv/page") == (200, b"from a volume\n")
    assert (await get(port, "/env"))[1].split() == [b"LISTEN_FDS=1"]
    bodies = [random.Random(number).randbytes(300_000) for number in range(8)]
    answers = await asyncio.gather(*(get(port, "/echo", body) for body in bodies))
    assert [hashlib.sha256(body).digest() for _, body in answers] == [hashlib.sha256(body).digest() for body in bodies]
    before = time.monotonic()
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143
    assert time.monotonic() - before < 30
    with pytest.raises(ConnectionRefusedError):
        await get(port, "/")


async def test_a_graceful_stop_ends_what_it_listens_on_and_leaves_it_the_rest(
    bench: WasmBench, go_server: bytes
) -> None:
    port = free_port()
    annotations = {KEY: str(port), "cri-shim.io/stop": "graceful"}
    plan = await serving(bench, bench.artifact(go_server, annotations=annotations))
    with await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port), 30) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        came = b""
        while b"begun\n" not in came:
            came += await asyncio.to_thread(connection.recv, 65536)
        await bench.handler.kill(plan.id, signal.SIGTERM)
        while part := await asyncio.to_thread(connection.recv, 65536):
            came += part
        assert b"done\n" in came
    assert (await bench.end_of(plan)).code == 0
    assert bench.text(plan)[-1] == "bye"


@pytest.mark.parametrize("listens", [True, False])
async def test_who_outlasts_its_grace_is_killed(bench: WasmBench, listens: bool) -> None:
    listen = {KEY: str(free_port())} if listens else {}
    plan = await bench.begin(bench.artifact(wasm.SLEEP, annotations={**listen, "cri-shim.io/stop": "graceful"}))
    await bench.said(plan, "going to sleep")
    await bench.handler.kill(plan.id, signal.SIGTERM)
    await asyncio.sleep(0.2)
    assert plan.id not in bench.ends
    await bench.handler.kill(plan.id, signal.SIGKILL)
    assert (await bench.end_of(plan)).code == 137


async def test_it_listens_in_the_pods_network(bench: WasmBench, go_server: bytes) -> None:
    pins = bench.layout.pod(bench.pod.id) / "ns"
    namespaces.pin_namespaces(pins, net=True, ipc=False, uts=False, hostname="", sysctls={})
    try:
        plan = bench.artifact(go_server, annotations={KEY: "80"})
        plan = await serving(bench, replace(plan, pod=replace(plan.pod, net=pins / "net")))
        for address in ("127.0.0.1", "::1"):
            ask = functools.partial(socket.create_connection, (address, 80), 30)
            with await asyncio.to_thread(namespaces.run_in_netns, pins / "net", ask) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert (await asyncio.to_thread(connection.recv, 100)).startswith(b"HTTP/1.0 200 OK")
        with pytest.raises(ConnectionRefusedError):
            await get(80, "/")
        await bench.handler.kill(plan.id, signal.SIGKILL)
        await bench.end_of(plan)
    finally:
        namespaces.unpin(pins)


async def test_a_port_that_is_taken_is_an_error_of_the_start(bench: WasmBench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        plan = bench.artifact(wasm.SLEEP, annotations={KEY: f"{free_port()},{port}"})
        await bench.handler.create(plan)
        with pytest.raises(FailedPrecondition, match=rf"listen: port {port}: Address already in use"):
            await bench.handler.start(plan.id)


@pytest.mark.parametrize(
    ("module", "text", "error", "words"),
    [
        (wasm.SLEEP, "http", InvalidArgument, "'http' is not a list of"),
        (wasm.SLEEP, "0", InvalidArgument, "TCP ports"),
        (wasm.SLEEP, "80,80", InvalidArgument, "different"),
        (wasm.SLEEP, "70000", InvalidArgument, "for example 8080"),
    ],
)
async def test_what_cannot_be_listened_on_is_refused(
    bench: WasmBench, module: str, text: str, error: type[CriShimError], words: str
) -> None:
    plan = bench.artifact(module, annotations={KEY: text})
    with pytest.raises(error, match=words):
        await bench.handler.create(plan)
    assert list(plan.bundle.iterdir()) == []
