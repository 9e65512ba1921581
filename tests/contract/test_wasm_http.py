"""Components of `wasi:http/proxy` in workers: what their clients get, whatever they do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException, IncompleteRead
from pathlib import Path

import pytest

from cri_shim.model.container import Reason, User
from cri_shim.model.errors import CriShimError, FailedPrecondition, InvalidArgument
from cri_shim.model.handler import ContainerPlan
from handlers.wasmtime.wasip2.http_places import PLACES
from handlers.wasmtime.wasip2.http_server import GONE
from tests.contract.handler_suite import until
from tests.contract.wasm_bench import WasmBench, worker_bench
from tests.support import leftovers, wasm
from tests.support.scale import count
from tests.support.wasm_http import PROXY

pytestmark = pytest.mark.root

HELLO = b"hello from a component\n"
SECONDS = 30


@pytest.fixture
async def bench(module_root: Path, tmp_path: Path, run_name: str) -> AsyncIterator[WasmBench]:
    parent = f"/{leftovers.CGROUP_PREFIX}{run_name}/http"
    async with worker_bench(module_root, tmp_path / "state", parent) as made:
        yield made


@pytest.fixture
def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def proxy(
    bench: WasmBench, port: int, *, text: str = PROXY, env: tuple[str, ...] = (), stop: str = ""
) -> ContainerPlan:
    annotations = {"cri-shim.io/listen": str(port)} | ({"cri-shim.io/stop": stop} if stop else {})
    return bench.artifact(text, env=env, annotations=annotations)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def asked(
    connection: HTTPConnection, path: str, body: bytes | Iterator[bytes] | None = None, method: str = ""
) -> Answer:
    connection.request(method or ("GET" if body is None else "POST"), path, body)
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def ask(port: int, path: str, body: bytes | Iterator[bytes] | None = None, method: str = "") -> Answer:
    with closing(HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
        return asked(connection, path, body, method)


def raw(port: int, data: bytes) -> bytes:
    """All that comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


async def test_requests_are_answered(bench: WasmBench, port: int) -> None:
    plan = await bench.begin(proxy(bench, port, env=("FIRST=the first", "SECOND=2")))
    answer = await asyncio.to_thread(ask, port, "/hello")
    assert (answer.status, answer.body) == (200, HELLO)
    assert "date" in answer.headers
    assert (await asyncio.to_thread(ask, port, "/variable")).body == b"the first"
    await asyncio.to_thread(ask, port, "/print")
    await bench.said(plan, HELLO.decode().strip())
    assert bench.entries(plan) == [("stdout", "F", HELLO.decode().strip())]
    assert bench.handler.info(plan.id)["http"] == [["", port]]


async def test_a_connection_serves_one_request_after_the_other(bench: WasmBench, port: int) -> None:
    await bench.begin(proxy(bench, port))

    def several() -> None:
        with closing(HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
            connection.connect()
            sock = connection.sock
            for _ in range(5):
                assert asked(connection, "/hello").body == HELLO
                assert asked(connection, "/hello", b"a body that nobody reads").body == HELLO
            assert connection.sock is sock

    await asyncio.to_thread(several)
    # All at once too: they are answered in their order.
    request = b"GET /hello HTTP/1.1\r\nHost: here\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nHost: here\r\n\r\n"
    answers = await asyncio.to_thread(raw, port, request * 3 + last)
    assert answers.count(b"HTTP/1.1 200") == answers.count(HELLO) == 3
    assert b"HTTP/1.1 500" in answers.rpartition(HELLO)[2]


async def test_bodies_go_through_as_they_come(bench: WasmBench, port: int) -> None:
    await bench.begin(proxy(bench, port))
    data = os.urandom(1 << 20)
    sized = await asyncio.to_thread(ask, port, "/echo", data)
    assert (sized.status, sized.body) == (200, data)
    in_chunks = await asyncio.to_thread(
        ask, port, "/echo", (data[at : at + 70_000] for at in range(0, len(data), 70_000))
    )
    assert in_chunks.body == data

    def by_turns() -> None:
        with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
            connection.sendall(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n")
            came = b""
            while b"100 Continue" not in came:
                came += connection.recv(65536)
            for part in (b"first", b"after"):
                connection.sendall(part)
                while part not in came:
                    came += connection.recv(65536)

    await asyncio.to_thread(by_turns)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/trap", "unreachable"),
        ("/nothing", "the component has not answered"),
        ("/fail", "the component answered with the error internal-error"),
        ("/x", "the component has left with code 1"),
    ],
)
async def test_a_request_that_fails_is_that_requests_matter(bench: WasmBench, port: int, path: str, words: str) -> None:
    plan = await bench.begin(proxy(bench, port))
    answer = await asyncio.to_thread(ask, port, path)
    assert (answer.status, answer.body) == (500, b"the component cannot answer\n")
    await bench.said(plan, words)
    assert all(stream == "stderr" for stream, _, _ in bench.entries(plan))
    assert f"wasi:http: GET {path}: " in bench.text(plan)[0]
    assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO


async def test_the_trap_in_the_log_says_where(bench: WasmBench, port: int) -> None:
    plan = await bench.begin(proxy(bench, port))
    await asyncio.to_thread(ask, port, "/trap")
    await bench.said(plan, "wasm trap")
    assert any("main!deeper" in line for line in bench.text(plan))


async def test_it_asks_other_servers(bench: WasmBench, port: int) -> None:
    """Here itself, from another instance; by names too, in the empty root that a worker has."""
    bench.pod.hosts.write_text("127.0.0.1 localhost\n")
    await bench.begin(proxy(bench, port))
    for host in ("127.0.0.1", "localhost"):
        answer = await asyncio.to_thread(ask, port, f"/ask/{host}:{port}/ask/{host}:{port}/hello")
        assert (answer.status, answer.body) == (200, HELLO)
    assert (await asyncio.to_thread(ask, port, f"/ask/127.0.0.1:{port}/trap")).body == b"the component cannot answer\n"


async def test_what_it_cannot_reach_is_told_by_its_code(bench: WasmBench, port: int, tmp_path: Path) -> None:
    bench.pod.hosts.write_text("127.0.0.1 localhost\n")
    plan = await bench.begin(proxy(bench, port))
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, "-keyout", "key", "-out", "cert")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")

    def refuse_trust(server: socket.socket) -> None:
        with contextlib.suppress(ssl.SSLError), server.accept()[0] as connection:
            context.wrap_socket(connection, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(SECONDS)
        unknown = server.getsockname()[1]
        meeting = asyncio.create_task(asyncio.to_thread(refuse_trust, server))
        assert (await asyncio.to_thread(ask, port, f"/bid/localhost:{unknown}/")).status == 502
        await meeting
    assert (await asyncio.to_thread(ask, port, f"/ask/127.0.0.1:{unknown}/")).status == 502
    assert (await asyncio.to_thread(ask, port, "/ask/no_such_host.invalid:80/")).status in {502, 504}
    for code in ("TLS-certificate-error", "connection-refused", "DNS-"):
        await bench.said(plan, f"the component answered with the error {code}")


async def test_a_response_that_breaks_off_is_not_taken_for_whole(bench: WasmBench, port: int) -> None:
    await bench.begin(proxy(bench, port))
    with pytest.raises(IncompleteRead):
        await asyncio.to_thread(ask, port, "/incomplete")
    # One that its component has neither finished nor dropped when it returns is, as StarlingMonkey's errors are.
    assert (await asyncio.to_thread(ask, port, "/open")).body == HELLO


async def test_nobody_waits_for_others(bench: WasmBench, port: int) -> None:
    """Neither for those that do not come back, nor for clients that are slow."""
    await bench.begin(proxy(bench, port))
    parts = [
        b"GET /spin HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /hel",
        b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n1",
    ]
    parts += [b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n"] * 10
    slow = [socket.create_connection(("127.0.0.1", port), SECONDS) for _ in parts]
    try:
        for connection, part in zip(slow, parts, strict=True):
            connection.sendall(part)
        for _ in range(5):
            assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO
        slow[1].sendall(b"lo HTTP/1.1\r\nHost: h\r\n\r\n")
        assert b"200 OK" in await asyncio.to_thread(slow[1].recv, 65536)
    finally:
        for connection in slow:
            connection.close()


async def test_a_request_that_sleeps_holds_nobody(bench: WasmBench, port: int) -> None:
    """Half of all places sleep; none of the quick requests is behind a slow one."""
    await bench.begin(proxy(bench, port))
    with ThreadPoolExecutor(PLACES) as clients:
        slow = [clients.submit(ask, port, "/wait") for _ in range(PLACES // 2)]
        late = [clients.submit(ask, port, "/late") for _ in range(PLACES // 4)]
        for _ in range(20):
            assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO
        assert [each.result(SECONDS).body for each in late] == [HELLO] * len(late)
        assert not any(each.done() for each in slow)
        await bench.aclose()  # and with it what they wait for


@pytest.mark.parametrize("path", ["/wait", "/spin"])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
async def test_an_instance_whose_client_has_gone_ends(bench: WasmBench, port: int, path: str, reset: bool) -> None:
    """A client's kernel forgets a closed socket after a minute, here after a second."""
    plan = await bench.begin(proxy(bench, port))
    pid = bench.handler.info(plan.id)["pid"]
    before, number = sockets(pid), 2 if path == "/spin" else PLACES
    for _ in range(number):
        with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1)
    assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO
    async with asyncio.timeout(SECONDS):
        while sockets(pid) > before:
            await asyncio.sleep(0.01)
    assert bench.text(plan) == []


async def test_who_may_have_gone_is_in_nobodys_way(bench: WasmBench, port: int) -> None:
    """Else nobody would be answered any more when as many clients as there are places have gone."""
    await bench.begin(proxy(bench, port))
    for _ in range(PLACES):
        with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
            connection.sendall(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n")
    assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO


def sockets(pid: object) -> int:
    """How many the process has open."""
    found = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(fd).startswith("socket:")
    return found


async def test_a_client_that_has_ended_its_side_gets_its_answer(bench: WasmBench, port: int) -> None:
    await bench.begin(proxy(bench, port))
    for path in ("/hello", "/late"):
        with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            connection.shutdown(socket.SHUT_WR)
            came = b""
            while part := await asyncio.to_thread(connection.recv, 65536):
                came += part
            assert HELLO in came


async def test_a_client_that_has_ended_its_side_gets_a_late_answer(bench: WasmBench, port: int) -> None:
    """As long as nobody waits for its place."""
    await bench.begin(proxy(bench, port))
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_connection(("127.0.0.1", port)) as connection:
        other.settimeout(SECONDS)
        connection.settimeout(SECONDS)
        connection.sendall(f"GET /ask/127.0.0.1:{other.getsockname()[1]}/ HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        connection.shutdown(socket.SHUT_WR)
        asking, _ = await asyncio.to_thread(other.accept)
        with asking:
            await asyncio.sleep(GONE / 1e9 + 1.5)
            asking.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nlate\n")
            came = b""
            while part := await asyncio.to_thread(connection.recv, 65536):
                came += part
    assert b"late\n" in came


async def test_the_head_of_a_response_does_not_wait_for_its_body(bench: WasmBench, port: int) -> None:
    await bench.begin(proxy(bench, port))
    with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
        connection.sendall(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n")
        came = await asyncio.to_thread(connection.recv, 65536)
        assert came.startswith(b"HTTP/1.1 200 ")
        assert came.endswith(b"\r\n\r\n")
        connection.sendall(b"body")
        while b"body" not in came:
            came += await asyncio.to_thread(connection.recv, 65536)


async def test_what_follows_on_a_connection_is_looked_at_like_the_first(bench: WasmBench, port: int) -> None:
    """At once, soon, and later: the thread that looks at it is not the same."""
    await bench.begin(proxy(bench, port))
    good = b"GET /hello HTTP/1.1\r\nHost: h\r\n\r\n"
    probe = b"GET /hello HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    for pause in (None, 0.0, 0.05):
        for parts, status in (
            ((b"what is this?\r\n\r\n",), b"400"),
            ((b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n",), b"501"),
            ((probe[:10], probe[10:]), b"200"),
        ):
            with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
                came = b""
                for part in (good, *parts):
                    connection.sendall(part)
                    while pause is not None and part is good and not came.endswith(b"\r\n0\r\n\r\n"):
                        came += await asyncio.to_thread(connection.recv, 65536)
                    await asyncio.sleep(pause or 0)
                while part := await asyncio.to_thread(connection.recv, 65536):
                    came += part
            assert came.startswith(b"HTTP/1.1 200 ")
            assert came.rpartition(b"HTTP/1.1 ")[2].startswith(status)


async def test_more_requests_than_places_are_all_answered(bench: WasmBench, port: int) -> None:
    plan = await bench.begin(proxy(bench, port))

    def several() -> list[bytes]:
        with closing(HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
            return [asked(connection, "/hello").body for _ in range(3)]

    with ThreadPoolExecutor(2 * PLACES) as clients:
        loop = asyncio.get_running_loop()
        answers = await asyncio.gather(*(loop.run_in_executor(clients, several) for _ in range(2 * PLACES)))
    assert answers == [[HELLO] * 3] * (2 * PLACES)
    # And when there is less to do, what was made for them goes.
    tasks = Path(f"/proc/{bench.handler.info(plan.id)['pid']}/task")
    async with asyncio.timeout(SECONDS):
        while len(list(tasks.iterdir())) > PLACES // 4:
            await asyncio.sleep(0.05)
    assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO


@pytest.mark.timeout(count(1200, 120))
async def test_requests_leave_nothing_behind(bench: WasmBench, port: int) -> None:
    """Neither those that are answered nor those that fail."""
    plan = await bench.begin(proxy(bench, port))
    pid, number = bench.handler.info(plan.id)["pid"], count(full=100_000, quick=1000)

    def ask_all(times: int) -> None:
        with closing(HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
            for _ in range(times):
                assert asked(connection, "/echo", b"body").body == b"body"
                assert asked(connection, "/hello").body == HELLO
        assert ask(port, "/nothing").status == 500

    await asyncio.to_thread(ask_all, 300)
    before = private_memory(pid), len(os.listdir(f"/proc/{pid}/fd"))
    await asyncio.to_thread(ask_all, number // 2)
    after = private_memory(pid), len(os.listdir(f"/proc/{pid}/fd"))
    assert after[0] - before[0] < (1 << 20) + 16 * number
    assert after[1] <= before[1] + 2  # connections that are being closed


def private_memory(pid: object) -> int:
    """Bytes that the process has for itself."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(rollup.partition("Private_Dirty:")[2].split()[0]) << 10


async def test_what_is_no_request_is_refused(bench: WasmBench, port: int) -> None:
    await bench.begin(proxy(bench, port))
    for data, status in (
        (b"what is this?\r\n\r\n", b"400"),
        (b"GET /hello HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"GET /hello HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 70_000, b"431"),
        (b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n", b"501"),
        (b"GET /hello HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", b"501"),
    ):
        assert (await asyncio.to_thread(raw, port, data)).split()[1] == status
    assert b"transfer-encoding" not in await asyncio.to_thread(raw, port, b"GET /hello HTTP/1.0\r\n\r\n")
    head = await asyncio.to_thread(ask, port, "/hello", None, "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO


@pytest.mark.parametrize("path", ["", "/spin", "/wait", "/echo"])
async def test_the_stop_signal_ends_it_whatever_it_does(bench: WasmBench, port: int, path: str) -> None:
    plan = await bench.begin(proxy(bench, port))
    with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
        if path:
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n".encode())
            assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO
        await bench.handler.kill(plan.id, signal.SIGTERM)
        assert (await bench.end_of(plan)).code == 143
    with pytest.raises(ConnectionRefusedError):
        await asyncio.to_thread(ask, port, "/hello")


async def test_a_graceful_stop_waits_for_the_requests_that_are_there(bench: WasmBench, port: int) -> None:
    plan = await bench.begin(proxy(bench, port, stop="graceful"))
    with (
        socket.create_connection(("127.0.0.1", port), SECONDS) as busy,
        socket.create_connection(("127.0.0.1", port), SECONDS) as idle,
    ):
        busy.sendall(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nha")
        came = b""
        while b"ha" not in came.partition(b"\r\n\r\n")[2]:
            came += await asyncio.to_thread(busy.recv, 65536)
        await bench.handler.kill(plan.id, signal.SIGTERM)
        assert await asyncio.to_thread(idle.recv, 1) == b""
        busy.sendall(b"lf")
        while part := await asyncio.to_thread(busy.recv, 65536):
            came += part
        assert came.endswith(b"2\r\nlf\r\n0\r\n\r\n")
        assert (await bench.end_of(plan)).code == 0


async def test_it_is_the_containers_user_in_every_thread(bench: WasmBench, port: int) -> None:
    plan = proxy(bench, port)
    await bench.begin(replace(plan, process=replace(plan.process, user=User(uid=1234, gid=4321))))
    await asyncio.to_thread(ask, port, "/hello")
    pid = bench.handler.info(plan.id)["pid"]
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    assert len(tasks) > 2
    for task in tasks:
        status = (task / "status").read_text()
        assert "Uid:\t1234\t1234\t1234\t1234" in status
        assert "CapEff:\t0000000000000000" in status


async def test_it_serves_where_runwasi_does(bench: WasmBench, port: int) -> None:
    variable = f"WASMTIME_HTTP_PROXY_SOCKET_ADDR=127.0.0.1:{port}"
    plan = await bench.begin(bench.artifact(PROXY, env=(variable,)))
    assert bench.handler.info(plan.id)["http"] == [["127.0.0.1", port]]
    assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO
    other = bench.artifact(PROXY)
    await bench.handler.create(other)
    assert bench.handler.info(other.id)["http"] == [["", 8080]]
    await bench.handler.delete(other.id, bench.cgroup_parent)
    with pytest.raises(InvalidArgument, match="WASMTIME_HTTP_PROXY_SOCKET_ADDR: 'here'"):
        await bench.handler.create(bench.artifact(PROXY, env=("WASMTIME_HTTP_PROXY_SOCKET_ADDR=here",)))


async def start_error(bench: WasmBench, plan: ContainerPlan) -> CriShimError:
    await bench.handler.create(plan)
    with pytest.raises(FailedPrecondition) as caught:
        await bench.handler.start(plan.id)
    await bench.handler.delete(plan.id, bench.cgroup_parent)
    assert list(plan.bundle.iterdir()) == []
    return caught.value


async def test_what_cannot_be_served_is_refused_by_name(bench: WasmBench, port: int) -> None:
    command = wasm.component("(i32.const 0)")
    assert "cri-shim.io/listen" in str(await start_error(bench, proxy(bench, port, text=command)))
    other = PROXY.replace('"wasi:cli/exit@0.2.0"', '"wasi:keyvalue/store@0.2.0"')
    assert "wasi:keyvalue/store@0.2.0" in str(await start_error(bench, proxy(bench, port, text=other)))
    with socket.create_server(("0.0.0.0", port)):
        assert f"*:{port}: Address already in use" in str(await start_error(bench, proxy(bench, port)))


async def test_past_its_memory_limit_the_kernel_ends_it(bench: WasmBench, port: int) -> None:
    """The limit is that of all instances together, and of the server."""
    plan = proxy(bench, port)
    plan.config.linux.resources.memory_limit_in_bytes = 64 << 20
    await bench.begin(plan)
    assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO
    with pytest.raises((ConnectionError, HTTPException)):
        await asyncio.to_thread(ask, port, "/grow")
    ended = await bench.end_of(plan)
    assert (ended.code, ended.reason) == (137, Reason.OOM_KILLED)


async def test_it_is_found_again_by_the_next_daemon(bench: WasmBench, port: int) -> None:
    plan = await bench.begin(proxy(bench, port))
    await bench.restart()
    assert await bench.handler.adopt(bench.record(plan, started_at=5), plan) is None
    assert (await asyncio.to_thread(ask, port, "/hello")).body == HELLO
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143


async def test_clients_leave_nothing_behind(bench: WasmBench, port: int) -> None:
    plan = await bench.begin(proxy(bench, port))
    pid = bench.handler.info(plan.id)["pid"]

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    await asyncio.to_thread(ask, port, "/hello")
    before = descriptors()
    for path in ("/hello", "/trap", "/incomplete", "/nothing") * 5:
        with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            await asyncio.to_thread(connection.recv, 65536)
    await until(lambda: descriptors() <= before)
