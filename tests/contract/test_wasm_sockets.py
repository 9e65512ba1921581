"""Components that use the network: real sockets in a pod's network namespace, names by the pod's files, as its user.

Which error is which code is held by `tests/unit/test_wasip2_sockets.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from cri_shim.kernel import namespaces
from cri_shim.model.container import User
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import ContainerPlan, ExecRequest
from tests.contract.wasm_bench import WasmBench, mount, worker_bench
from tests.support import components, leftovers, rust_guests, wasm

pytestmark = pytest.mark.root

_T = TypeVar("_T")

ACCESS_DENIED = 101
ADDRESS_IN_USE = 112
CONNECTION_REFUSED = 114
TEMPORARY_FAILURE = 119


class Pod:
    """A network of its own, with loopback only."""

    def __init__(self, bench: WasmBench, pins: Path) -> None:
        self.bench = bench
        self.net = pins / "net"

    def plan(
        self, guest: str | bytes, *args: str, uid: int = 0, mounts: tuple[object, ...] = (), **annotations: str
    ) -> ContainerPlan:
        settings = {f"cri-shim.io/{key}": value for key, value in annotations.items()}
        plan = self.bench.artifact(guest, *args, annotations=settings, mounts=list(mounts))
        process = replace(plan.process, user=User(uid=uid, gid=uid))
        return replace(plan, pod=replace(plan.pod, net=self.net), process=process)

    async def inside(self, call: Callable[[], _T]) -> _T:
        """In a thread that is in the pod's network."""
        return await asyncio.to_thread(namespaces.run_in_netns, self.net, call)

    async def connected(self, host: str, port: int) -> socket.socket:
        return await self.inside(lambda: socket.create_connection((host, port), 10))


@pytest.fixture
async def bench(module_root: Path, tmp_path: Path, run_name: str) -> AsyncIterator[WasmBench]:
    parent = f"/{leftovers.CGROUP_PREFIX}{run_name}/sockets"
    async with worker_bench(module_root, tmp_path / "state", parent) as made:
        yield made


@pytest.fixture
def pod(bench: WasmBench) -> Iterator[Pod]:
    pins = bench.layout.pod(bench.pod.id) / "ns"
    namespaces.pin_namespaces(pins, net=True, ipc=False, uts=False, hostname="", sysctls={})
    bench.pod.resolv_conf.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    bench.pod.hosts.write_text("127.0.0.1 localhost\n10.1.2.3 database db\n")
    yield Pod(bench, pins)
    namespaces.unpin(pins)


def echoed(connection: socket.socket, data: bytes) -> bytes:
    def send() -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    received = b"".join(iter(lambda: connection.recv(65536), b""))
    sender.join()
    return received


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_server_is_in_the_pods_network_and_stops_at_once(bench: WasmBench, pod: Pod, host: str) -> None:
    plan = await bench.begin(pod.plan(components.echo_server(host, 8080)))
    await bench.said(plan, "listening")
    data = random.Random(1).randbytes(300_000)
    for _ in range(2):
        with await pod.connected(host, 8080) as connection:
            assert await asyncio.to_thread(echoed, connection, data) == data
    with pytest.raises(ConnectionRefusedError), socket.create_connection((host, 8080), 5):
        pass
    waiting = await pod.connected(host, 8080)  # and it waits for what comes
    before = time.monotonic()
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143
    assert time.monotonic() - before < 30
    with waiting, contextlib.suppress(ConnectionResetError):
        assert waiting.recv(1) == b""


async def test_a_client_connects_to_a_server(bench: WasmBench, pod: Pod) -> None:
    server = await bench.begin(pod.plan(components.echo_server("0.0.0.0", 8080)))
    await bench.said(server, "listening")
    plan = pod.plan(components.client("127.0.0.1", 8080, "one\ntwo\n"))
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == ["one", "two"]
    assert (await bench.finish(pod.plan(components.client("127.0.0.1", 1, "x")))).code == CONNECTION_REFUSED


async def test_datagrams_come_and_go(bench: WasmBench, pod: Pod) -> None:
    plan = await bench.begin(pod.plan(components.udp_echo_server("0.0.0.0", 5353)))
    await bench.said(plan, "listening")

    def ask() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            sock.sendto(b"hello", ("127.0.0.1", 5353))
            data, address = sock.recvfrom(100)
            assert address == ("127.0.0.1", 5353)
            return data

    assert await pod.inside(ask) == b"hello"
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143


async def test_a_low_port_is_for_root(bench: WasmBench, pod: Pod) -> None:
    plan = pod.plan(components.echo_server("0.0.0.0", 80), uid=1234)
    assert (await bench.finish(plan)).code == ACCESS_DENIED
    plan = await bench.begin(pod.plan(components.echo_server("0.0.0.0", 80)))
    await bench.said(plan, "listening")


async def test_a_graceful_stop_ends_what_it_listens_on(bench: WasmBench, pod: Pod) -> None:
    plan = await bench.begin(pod.plan(components.echo_server("127.0.0.1", 8080), stop="graceful"))
    await bench.said(plan, "listening")
    with await pod.connected("127.0.0.1", 8080) as connection:
        connection.sendall(b"a")
        assert await asyncio.to_thread(connection.recv, 1) == b"a"
        await bench.handler.kill(plan.id, signal.SIGTERM)
        connection.sendall(b"b")
        assert await asyncio.to_thread(connection.recv, 1) == b"b"
    assert (await bench.end_of(plan)).code == 0


async def test_names_are_those_of_the_pod(bench: WasmBench, pod: Pod, tmp_path: Path) -> None:
    plan = pod.plan(components.resolves("db"))
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == ["10.1.2.3"]
    # What the container has in the place of the pod's file, as with the kubelet.
    (tmp_path / "hosts").write_text("10.9.9.9 db\n")
    plan = pod.plan(components.resolves("db"), mounts=(mount(tmp_path / "hosts", "/etc/hosts"),))
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == ["10.9.9.9"]


class NameServer:
    """Answers each question for an address with one, or not at all."""

    def __init__(self, sock: socket.socket, answer: bytes | None) -> None:
        self._sock = sock
        self._answer = answer
        self.asked = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            query, address = self._sock.recvfrom(512)
            if not query:
                return
            self.asked.set()
            if self._answer is None:
                continue
            end = query.index(b"\0", 12) + 5
            is_v4 = query[end - 4 : end - 2] == b"\0\1"
            found = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + self._answer if is_v4 else b""
            counts = b"\0\1" + bytes([0, int(is_v4)]) + b"\0\0\0\0"
            self._sock.sendto(query[:2] + b"\x81\x80" + counts + query[12:end] + found, address)

    def close(self) -> None:
        self._sock.sendto(b"", self._sock.getsockname())
        self._thread.join()
        self._sock.close()


@contextlib.asynccontextmanager
async def name_server(pod: Pod, answer: bytes | None) -> AsyncIterator[NameServer]:
    def bound() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 53))
        return sock

    server = NameServer(await pod.inside(bound), answer)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.close)


async def test_names_that_no_file_has_are_asked_for(bench: WasmBench, pod: Pod) -> None:
    async with name_server(pod, bytes([192, 0, 2, 7])) as server:
        plan = pod.plan(components.resolves("service.example"))
        assert (await bench.finish(plan)).code == 0
        assert bench.text(plan) == ["192.0.2.7"]
        assert server.asked.is_set()
    # Nobody is there any more.
    assert (await bench.finish(pod.plan(components.resolves("service.example")))).code == TEMPORARY_FAILURE


async def test_a_lookup_that_nobody_answers_holds_up_no_stop(bench: WasmBench, pod: Pod) -> None:
    bench.pod.resolv_conf.write_text("nameserver 127.0.0.1\noptions timeout:30\n")
    async with name_server(pod, None) as server:
        plan = await bench.begin(pod.plan(components.resolves("service.example")))
        assert await asyncio.to_thread(server.asked.wait, 30)
        before = time.monotonic()
        await bench.handler.kill(plan.id, signal.SIGTERM)
        assert (await bench.end_of(plan)).code == 143
        assert time.monotonic() - before < 25  # the lookup would take a minute


async def test_the_worker_has_the_files_for_names_and_nothing_else(bench: WasmBench, pod: Pod) -> None:
    plan = await bench.begin(pod.plan(components.echo_server("127.0.0.1", 8080)))
    await bench.said(plan, "listening")
    root = Path(f"/proc/{bench.handler.info(plan.id)['pid']}/root")
    assert {str(path.relative_to(root)) for path in root.rglob("*")} == {
        *("etc", "etc/hosts", "etc/nsswitch.conf", "etc/resolv.conf")
    }
    with pytest.raises(OSError, match="Read-only"):
        (root / "etc" / "hosts").write_text("")


@pytest.mark.parametrize("code", [0, 7, 255])
async def test_who_exits_with_a_code_has_it(bench: WasmBench, pod: Pod, code: int) -> None:
    plan = pod.plan(components.exits(code))
    assert (await bench.finish(plan)).code == code
    assert bench.text(plan) == []


async def test_what_nobody_provides_is_refused_by_name(bench: WasmBench, pod: Pod) -> None:
    for name in ("wasi:keyvalue/store@0.2.0-draft", "wasi:clocks/timezone@0.2.12", "wasi:cli/stdout@0.3.0"):
        for text in (wasm.component("(i32.const 0)"), components.exits(0)):
            plan = pod.plan(text.replace("(component", f'(component (import "{name}" (instance))', 1))
            await bench.handler.create(plan)
            with pytest.raises(FailedPrecondition, match=f"imports {name}, which is not provided"):
                await bench.handler.start(plan.id)


async def test_the_trap_of_a_component_on_our_host_is_told(bench: WasmBench, pod: Pod) -> None:
    plan = pod.plan(components.program("unreachable"))
    ended = await bench.finish(plan)
    assert ended.code == 134
    assert "unreachable" in ended.message
    # What the host says of it is the message.
    plan = pod.plan(
        components.program("(call $send (i32.const 9) (i32.const 0) (i32.const 0) (i32.const 0)) (i32.const 0)")
    )
    assert (await bench.finish(plan)).code == 134
    assert any("unknown handle index 9" in line for line in bench.text(plan))


async def test_exec_is_another_instance_in_the_same_network(bench: WasmBench, pod: Pod) -> None:
    plan = await bench.begin(pod.plan(components.echo_server("127.0.0.1", 8080)))
    await bench.said(plan, "listening")
    read, write = os.pipe()
    session = await bench.handler.exec(plan.id, ExecRequest(("module.wasm",), None, write, write))
    os.close(write)
    assert await session.wait() == ADDRESS_IN_USE
    os.close(read)


async def test_the_next_daemon_finds_it_serving(bench: WasmBench, pod: Pod) -> None:
    plan = await bench.begin(pod.plan(components.echo_server("127.0.0.1", 8080)))
    await bench.said(plan, "listening")
    with await pod.connected("127.0.0.1", 8080) as connection:
        await bench.restart()
        assert await bench.handler.adopt(bench.record(plan, started_at=5), plan) is None
        assert await asyncio.to_thread(echoed, connection, b"still there") == b"still there"
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143


async def test_it_is_stopped_while_it_computes(bench: WasmBench, pod: Pod) -> None:
    body = "(call $say (i32.const 96) (i32.const 10)) (loop $forever (br $forever)) unreachable"
    plan = await bench.begin(pod.plan(components.program(body)))
    await bench.said(plan, "listening")
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143


@pytest.mark.skipif(
    rust_guests.program() is None, reason="needs Rust with the target wasm32-wasip2 (https://rustup.rs) for its guest"
)
async def test_a_program_of_a_standard_library(
    bench: WasmBench, pod: Pod, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    guest = rust_guests.build("network", tmp_path_factory.mktemp("rust"))
    (tmp_path / "question").write_text("what is it?\n")
    data = mount(tmp_path, "/data")
    server = await bench.begin(pod.plan(guest, "network", "serve", "0.0.0.0:8080", mounts=(data,)))
    await bench.said(server, "listening on 0.0.0.0:8080")
    client = pod.plan(guest, "network", "ask", "127.0.0.1:8080", mounts=(data,))
    assert (await bench.finish(client)).code == 0
    assert bench.text(client) == ["WHAT IS IT?"]
    assert (tmp_path / "last").read_text() == "what is it?\n"
    for name, said, status in (("db", "10.1.2.3:80", 0), ("nowhere.invalid", "Uncategorized", 1)):
        plan = pod.plan(guest, "network", "lookup", name)
        assert (await bench.finish(plan)).code == status
        assert bench.text(plan) == [said]
    refused = pod.plan(guest, "network", "ask", "127.0.0.1:1", mounts=(data,))
    assert (await bench.finish(refused)).code == 1
    assert bench.text(refused) == ["ConnectionRefused"]
