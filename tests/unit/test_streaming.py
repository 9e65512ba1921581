"""The streaming server on loopback with sessions in this process, driven by clients that send what each test wants."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from cri_shim.model.errors import (
    CriShimError,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from cri_shim.model.streams import ClientStreams, Session, Source, TerminalSize, Wanted
from cri_shim.streaming import channels, link
from cri_shim.streaming.server import MAX_WAITING, Server, Settings
from cri_shim.streaming.ticket import Limits
from cri_shim.streaming.tokens import MAX_OUTSTANDING, TTL_SECONDS
from tests.support import spdy
from tests.support.streaming_client import CHANNELS, Refused, SpdyClient, WebSocketClient, connect, head, spdy_head

ALL = Wanted(stdin=True, stdout=True, stderr=True, tty=False)
OUTPUT = Wanted(stdin=False, stdout=True, stderr=False, tty=False)
TERMINAL = Wanted(stdin=True, stdout=True, stderr=False, tty=True)
SPDY_VERSIONS = ["channel.k8s.io", "v2.channel.k8s.io", "v3.channel.k8s.io", "v4.channel.k8s.io", "v5.channel.k8s.io"]


@asynccontextmanager
async def serving(settings: Settings | None = None, clock: Callable[[], float] = lambda: 0.0) -> AsyncIterator[Server]:
    server = Server(settings or Settings(), clock)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as made:
        yield made


def in_time(action: Awaitable[object]) -> Awaitable[object]:
    """Far longer than it takes: a test fails here rather than hangs."""
    return asyncio.wait_for(action, 60)


async def forever(action: Callable[[], Awaitable[object]]) -> None:
    while True:
        await action()
        await asyncio.sleep(0)


async def pieces(source: Source) -> AsyncIterator[bytes]:
    while piece := await source.read():
        yield piece


async def echo(streams: ClientStreams) -> int:
    """What comes goes back; the exit status is the last byte's."""
    last = b"\0"
    assert streams.stdin is not None
    assert streams.stdout is not None
    while piece := await streams.stdin.read():
        await streams.stdout.write(piece)
        last = piece
    return last[-1]


def ends(code: int, output: bytes = b"") -> Session:
    async def session(streams: ClientStreams) -> int:
        if output:
            assert streams.stdout is not None
            await streams.stdout.write(output)
        return code

    return session


async def opened(url: str, *roles: str, protocol: str = "v4.channel.k8s.io") -> SpdyClient:
    client = await SpdyClient.open(url, protocol)
    for role in roles:
        client.stream(role)
    return client


def told(report: bytes, version: int, code: int) -> None:
    """What the error stream has to hold."""
    if version < 4:
        assert report == (f"command terminated with exit code {code}".encode() if code else b"")
    elif code:
        status = json.loads(report)
        assert (status["status"], status["reason"]) == ("Failure", "NonZeroExitCode")
        assert status["details"] == {"causes": [{"reason": "ExitCode", "message": str(code)}]}
    else:
        assert json.loads(report) == {"metadata": {}, "status": "Success"}


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("code", [0, 3, 137])
async def test_the_end_of_a_command_over_spdy(server: Server, version: int, code: int) -> None:
    client = await opened(
        server.exec_url(OUTPUT, ends(code, b"out")), "error", "stdout", protocol=SPDY_VERSIONS[version - 1]
    )
    await client.until_goaway()
    assert f"x-stream-protocol-version: {SPDY_VERSIONS[version - 1]}\r\n" in client.response
    assert client.received("stdout") == b"out"
    assert client.has_ended("stdout")
    assert client.has_ended("error")
    told(client.received("error"), version, code)


@pytest.mark.parametrize(
    ("protocols", "version"),
    [
        ((), 1),
        (("channel.k8s.io",), 1),
        (("base64.channel.k8s.io",), 1),
        (("v2.channel.k8s.io",), 2),
        (("v3.channel.k8s.io",), 3),
        (("v4.channel.k8s.io",), 4),
        (("v4.base64.channel.k8s.io",), 4),
        (("v9.channel.k8s.io", "v5.channel.k8s.io", "v4.channel.k8s.io"), 5),
    ],
)
@pytest.mark.parametrize("code", [0, 3])
async def test_the_end_of_a_command_over_websocket(
    server: Server, protocols: tuple[str, ...], version: int, code: int
) -> None:
    client = await WebSocketClient.open(server.exec_url(OUTPUT, ends(code, b"out")), *protocols)
    await client.until_closed()
    assert client.core.close_code == 1000
    answers = [line for line in client.response.split("\r\n") if line.lower().startswith("sec-websocket-protocol: ")]
    assert [line.partition(": ")[2] for line in answers] == [name for name in protocols if not name.startswith("v9")][
        :1
    ]
    assert client.messages[0] == (b"1" if client.in_base64 else b"\x01")  # the greeting
    assert client.received(CHANNELS["stdout"]) == b"out"
    told(client.received(CHANNELS["error"]), version, code)


async def test_both_directions_with_half_close(server: Server) -> None:
    client = await opened(server.exec_url(ALL, echo), "error", "stdin", "stdout", "stderr")
    content = random.Random(7).randbytes(8 << 20)

    async def send() -> None:
        await client.send("stdin", content)
        client.end("stdin")

    sending = asyncio.create_task(send())
    await in_time(client.until_goaway())
    await sending
    assert hashlib.sha256(client.received("stdout")).digest() == hashlib.sha256(content).digest()
    assert client.received("stderr") == b""
    assert client.has_ended("stderr")
    told(client.received("error"), 4, content[-1])


async def test_a_hundred_sessions_at_once(server: Server) -> None:
    async def exchange(number: int) -> None:
        content = random.Random(number).randbytes(1 << 20)
        client = await opened(server.exec_url(ALL, echo), "error", "stdin", "stdout", "stderr")

        async def send() -> None:
            await client.send("stdin", content)
            client.end("stdin")

        sending = asyncio.create_task(send())
        await client.until_goaway()
        await sending
        assert hashlib.sha256(client.received("stdout")).digest() == hashlib.sha256(content).digest()
        told(client.received("error"), 4, content[-1])

    await in_time(asyncio.gather(*(exchange(number) for number in range(100))))


async def test_stdin_of_a_websocket_ends_in_v5(server: Server) -> None:
    client = await WebSocketClient.open(server.exec_url(ALL, echo), "v5.channel.k8s.io")
    content = random.Random(8).randbytes(3 << 20)

    async def send() -> None:
        await client.send(CHANNELS["stdin"], content)
        client.message(b"\xff\x00")

    sending = asyncio.create_task(send())
    await in_time(client.until_closed())
    await sending
    assert client.received(CHANNELS["stdout"]) == content
    told(client.received(CHANNELS["error"]), 5, content[-1])


def test_a_daemon_without_streams_loads_neither_protocol() -> None:
    program = "import sys, cri_shim.app; print(*{'h11', 'websockets'} & sys.modules.keys())"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert loaded == "\n"


async def test_what_came_with_the_request_is_not_lost(server: Server) -> None:
    url = server.exec_url(ALL, echo)
    reader, writer = await connect(url)
    peer = spdy.SpdyPeer()
    sent = spdy_head(url, "v4.channel.k8s.io")
    for role in ("error", "stdin", "stdout", "stderr"):
        sent += peer.open({"streamtype": role})
    writer.write(sent + spdy.data(3, b"early\0", spdy.FIN))
    await in_time(reader.readuntil(b"\r\n\r\n"))
    while not peer.goaways:
        peer.receive(await asyncio.wait_for(reader.read(65536), 60))
    writer.close()
    assert bytes(peer.received[5]) == b"early\0"


async def test_a_request_that_comes_byte_by_byte(server: Server) -> None:
    url = server.exec_url(OUTPUT, ends(0, b"out"))
    reader, writer = await connect(url)
    peer = spdy.SpdyPeer()
    sent = (
        spdy_head(url, "v4.channel.k8s.io") + peer.open({"streamtype": "error"}) + peer.open({"streamtype": "stdout"})
    )
    for byte in sent:
        writer.write(bytes((byte,)))
        await asyncio.sleep(0)
    await in_time(reader.readuntil(b"\r\n\r\n"))
    while not peer.goaways:
        peer.receive(await asyncio.wait_for(reader.read(65536), 60))
    writer.close()
    assert bytes(peer.received[3]) == b"out"


async def test_sizes_of_the_terminal(server: Server) -> None:
    seen: list[TerminalSize] = []
    first = asyncio.Event()

    async def session(streams: ClientStreams) -> int:
        async for size in streams.sizes():
            seen.append(size)
            first.set()
        return 0

    client = await opened(server.exec_url(TERMINAL, session), "error", "stdin", "stdout", "resize")
    await client.send("resize", b'{"Width":80,"Hei')
    await client.send("resize", b'ght":24}\n')
    await in_time(first.wait())
    await client.send("resize", b'{"Width":0,"Height":0}{"Width":1,"Height":2}nonsense}{"Width":132,"Height":43}')
    client.end("resize")
    await client.until_goaway()
    assert seen == [TerminalSize(80, 24), TerminalSize(132, 43)]


async def test_sizes_end_with_the_client(server: Server) -> None:
    over = asyncio.Event()

    async def session(streams: ClientStreams) -> int:
        async for _ in streams.sizes():
            pass
        over.set()
        return 0

    client = await WebSocketClient.open(server.exec_url(TERMINAL, session), "v5.channel.k8s.io")
    await client.send(CHANNELS["resize"], b'{"Width":80,"Height":24}')
    client.writer.close()
    await in_time(over.wait())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FailedPrecondition("no such program", hint="look"), "no such program; look"),
        (Internal("broken"), "broken"),
        (ValueError("secret"), "internal error: ValueError; see the daemon's log"),
        (ConnectionRefusedError("secret"), "internal error: ConnectionRefusedError; see the daemon's log"),
    ],
)
async def test_a_session_that_fails(server: Server, error: Exception, words: str) -> None:
    async def session(_streams: ClientStreams) -> int:
        raise error

    client = await opened(server.exec_url(OUTPUT, session), "error", "stdout")
    await client.until_goaway()
    assert client.status() == {
        "metadata": {}, "status": "Failure", "message": words, "reason": "InternalError", "code": 500
    }  # fmt: skip
    client = await opened(server.exec_url(OUTPUT, session), "error", "stdout", protocol="v2.channel.k8s.io")
    await client.until_goaway()
    assert client.received("error") == words.encode()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (NotFound("gone"), 404, "NotFound"),
        (FailedPrecondition("exited"), 400, "BadRequest"),
        (ResourceExhausted("full"), 429, "TooManyRequests"),
        (Unavailable("not now"), 503, "ServiceUnavailable"),
        (Internal("broken"), 500, "InternalError"),
    ],
)
async def test_an_attach_that_cannot_be_any_more(server: Server, error: CriShimError, status: int, reason: str) -> None:
    def check() -> None:
        raise error

    with pytest.raises(Refused) as refused:
        await SpdyClient.open(server.attach_url(OUTPUT, ends(0), check))
    document = json.loads(refused.value.body)
    assert refused.value.status == document["code"] == status
    assert (document["kind"], document["apiVersion"], document["status"]) == ("Status", "v1", "Failure")
    assert (document["reason"], document["message"]) == (reason, str(error))
    assert ("retry-after" in refused.value.head) == (status in {429, 503})


async def test_a_client_that_does_not_read_stops_the_writer(server: Server) -> None:
    written, stuck = 0, asyncio.Event()
    broken = asyncio.Event()

    async def session(streams: ClientStreams) -> int:
        nonlocal written
        assert streams.stdout is not None
        try:
            while True:
                await asyncio.wait_for(streams.stdout.write(bytes(32 << 10)), 0.5)
                written += 32 << 10
        except TimeoutError:
            stuck.set()
        await streams.gone()
        with pytest.raises(ConnectionError):
            await streams.stdout.write(b"more")
        broken.set()
        return 0

    client = await opened(server.exec_url(OUTPUT, session), "error", "stdout")
    await in_time(stuck.wait())
    # What the kernel's buffers hold, and ours: never what the writer has.
    assert written < (16 << 20)
    client.writer.transport.abort()
    await in_time(broken.wait())


async def test_a_stream_that_never_waits_leaves_others_their_turn(server: Server) -> None:
    turns = 0
    in_a_row: list[int] = []

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def session(streams: ClientStreams) -> int:
        assert streams.stdout is not None
        ticking = asyncio.create_task(others())
        await asyncio.sleep(0)
        before = -1
        for _ in range(200):
            if turns != before:
                before = turns
                in_a_row.append(0)
            in_a_row[-1] += 32 << 10
            await streams.stdout.write(bytes(32 << 10))
        ticking.cancel()
        return 0

    client = await opened(server.exec_url(OUTPUT, session), "error", "stdout")
    await in_time(client.until_goaway())
    assert len(client.received("stdout")) == 200 * (32 << 10)
    assert max(in_a_row) == channels.MAX_IN_A_ROW


async def test_a_slow_client_gets_everything(server: Server) -> None:
    content = random.Random(9).randbytes(6 << 20)

    async def session(streams: ClientStreams) -> int:
        assert streams.stdout is not None
        await streams.stdout.write(content)
        return 0

    client = await opened(server.exec_url(OUTPUT, session), "error", "stdout")
    while not client.peer.goaways:
        assert await client.read_some(16 << 10)
        await asyncio.sleep(0.001)
    await client.close()
    assert client.received("stdout") == content
    told(client.received("error"), 4, 0)


async def test_a_client_that_pauses_after_the_end_gets_everything_all_the_same(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LINGER_SECONDS", 0.0)
    monkeypatch.setattr(link, "_LOOK_SECONDS", 0.01)
    content = random.Random(10).randbytes(8 << 20)
    over = asyncio.Event()

    async def session(streams: ClientStreams) -> int:
        assert streams.stdout is not None
        for start in range(0, len(content), 32 << 10):
            await streams.stdout.write(content[start : start + (32 << 10)])
        over.set()
        return 0

    client = await opened(server.exec_url(OUTPUT, session), "error", "stdout")
    while not over.is_set():
        await client.read_some(4 << 10)
    await asyncio.sleep(0.3)
    await in_time(client.until_goaway())
    assert client.received("stdout") == content
    told(client.received("error"), 4, 0)


async def test_a_session_that_does_not_read_stops_the_client_and_notices_its_end(server: Server) -> None:
    left = asyncio.Event()

    async def session(streams: ClientStreams) -> int:
        await streams.gone()
        left.set()
        return 0

    client = await opened(server.exec_url(ALL, session), "error", "stdin", "stdout", "stderr")
    sent = 0

    async def send() -> None:
        nonlocal sent
        await asyncio.wait_for(client.send("stdin", bytes(32 << 10)), 0.5)
        sent += 32 << 10

    with pytest.raises(TimeoutError):
        await forever(send)
    assert sent < (16 << 20)
    # Without a reset the kernel would first try to deliver what it has.
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()
    await in_time(left.wait())


async def test_a_websocket_that_is_not_read_gets_signs_of_life(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "REASSURE_SECONDS", 0.01)
    content = bytes(2 * channels.MAX_HELD)
    enough = asyncio.Event()

    async def session(streams: ClientStreams) -> int:
        await enough.wait()
        assert streams.stdin is not None
        return int(sum([len(piece) async for piece in pieces(streams.stdin)]) == len(content))

    client = await WebSocketClient.open(server.exec_url(ALL, session), "v5.channel.k8s.io")
    sending = asyncio.create_task(client.send(CHANNELS["stdin"], content))
    while client.pongs < 3:
        await client.read_some()
    enough.set()
    await sending
    client.message(b"\xff\x00")
    await in_time(client.until_closed())
    told(client.received(CHANNELS["error"]), 5, 1)


async def test_what_a_client_has_sent_before_it_left_can_be_read(server: Server) -> None:
    got = asyncio.get_running_loop().create_future()

    async def session(streams: ClientStreams) -> int:
        await streams.gone()
        assert streams.stdin is not None
        got.set_result(sum([len(piece) async for piece in pieces(streams.stdin)]))
        return 0

    client = await opened(server.exec_url(ALL, session), "error", "stdin", "stdout", "stderr")
    # More than is held, so that reading has stopped, and no more than the kernel takes.
    await client.send("stdin", bytes(channels.MAX_HELD + (96 << 10)))
    while len(client.peer.replied) < 4:
        await client.read_some()
    await client.close()
    assert await in_time(got) == channels.MAX_HELD + (96 << 10)


async def test_input_that_nobody_takes_holds_up_nothing_at_the_end(server: Server) -> None:
    async def session(streams: ClientStreams) -> int:
        assert streams.stdin is not None
        await streams.stdin.read()
        return 5

    client = await opened(server.exec_url(ALL, session), "error", "stdin", "stdout", "stderr")
    sending = asyncio.create_task(client.send("stdin", bytes(8 << 20)))
    await in_time(client.until_goaway())
    told(client.received("error"), 4, 5)
    sending.cancel()


async def test_a_stream_that_the_client_resets(server: Server) -> None:
    async def session(streams: ClientStreams) -> int:
        assert streams.stdin is not None
        assert streams.stdout is not None
        write = streams.stdout.write
        assert await streams.stdin.read() == b""
        with pytest.raises(ConnectionError):
            await forever(lambda: write(b"x"))
        return 6

    client = await opened(server.exec_url(ALL, session), "error", "stdin", "stdout", "stderr")
    client.writer.write(spdy.reset(client.roles["stdin"]) + spdy.reset(client.roles["stdout"]))
    await in_time(client.until_goaway())
    told(client.received("error"), 4, 6)


async def test_streams_that_were_not_asked_for_and_those_that_come_twice(server: Server) -> None:
    client = await opened(server.exec_url(OUTPUT, ends(0, b"out")), "nonsense", "error", "stdin")
    again = client.stream("stdin")
    stranger = client.roles["nonsense"]
    client.stream("stdout")
    await client.until_goaway()
    assert client.peer.resets == {stranger: 3, again: 3}
    assert client.received("stdout") == b"out"


async def test_tokens_are_good_for_one_use_within_a_minute_and_for_one_thing() -> None:
    now = 0.0
    async with serving(clock=lambda: now) as server:

        async def status(url: str) -> int:
            with pytest.raises(Refused) as refused:
                await SpdyClient.open(url)
            assert refused.value.body == b"no such token: it is unknown, used, or too old\n"
            return refused.value.status

        url = server.exec_url(OUTPUT, ends(0))
        assert len(url.rpartition("/")[2]) >= 128 / 6
        assert await status(url.replace("/exec/", "/attach/")) == 404
        assert await status(url) == 404  # used up by it
        url = server.exec_url(OUTPUT, ends(0))
        now = TTL_SECONDS
        assert await status(url) == 404
        url = server.exec_url(OUTPUT, ends(0))
        now += TTL_SECONDS - 0.1
        client = await opened(url, "error", "stdout")
        await client.until_goaway()
        assert await status(url) == 404
        assert await status(url[:-1]) == 404
        assert await status(url + "/more") == 404
        assert await status(url.rpartition("/")[0]) == 404
        assert await status(url.rpartition("/exec")[0] + "/") == 404


async def test_at_most_a_thousand_tokens_wait() -> None:
    now = 0.0
    async with serving(clock=lambda: now) as server:
        urls = {server.exec_url(OUTPUT, ends(0)) for _ in range(MAX_OUTSTANDING)}
        assert len(urls) == MAX_OUTSTANDING
        with pytest.raises(ResourceExhausted, match="1000 streaming requests wait for their client; each gives up"):
            server.exec_url(OUTPUT, ends(0))
        client = await opened(urls.pop(), "error", "stdout")
        await client.until_goaway()
        server.exec_url(OUTPUT, ends(0))
        now = TTL_SECONDS
        server.exec_url(OUTPUT, ends(0))


async def test_no_token_is_logged(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    async def session(_streams: ClientStreams) -> int:
        raise ValueError

    tokens = []
    for _ in range(3):
        url = server.exec_url(OUTPUT, session)
        tokens.append(url.rpartition("/")[2])
        client = await opened(url, "error", "stdout")
        await client.until_goaway()
        with pytest.raises(Refused):
            await SpdyClient.open(url)
    out = "".join(capsys.readouterr())
    assert "session failed" in out
    assert not any(token in out for token in tokens)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"PUT /exec/abc HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: x\r\n\r\n", 505),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * (17 << 10), 431),
        (bytes(40), 400),
    ],
)
async def test_requests_that_cannot_be_served(server: Server, request_bytes: bytes, status: int) -> None:
    server.exec_url(OUTPUT, ends(0))
    reader, writer = await connect(server.exec_url(OUTPUT, ends(0)))
    writer.write(request_bytes)
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    assert int(answer.split()[1]) == status
    assert b"connection: close\r\n" in answer.lower()


async def test_protocols_that_do_not_fit(server: Server) -> None:
    url = server.exec_url(OUTPUT, ends(0))
    with pytest.raises(Refused) as refused:
        await SpdyClient.open(url, "v9.channel.k8s.io")
    assert refused.value.status == 403
    assert refused.value.head.count("x-accepted-stream-protocol-versions: ") == 5
    with pytest.raises(Refused) as refused:
        await WebSocketClient.open(server.exec_url(OUTPUT, ends(0)), "v9.channel.k8s.io")
    assert refused.value.status == 403
    for headers in (
        {"Connection": "Upgrade", "Upgrade": "SPDY/3.1"},
        {"X-Stream-Protocol-Version": "v4.channel.k8s.io"},
        {"X-Stream-Protocol-Version": "v4.channel.k8s.io", "Connection": "Upgrade", "Upgrade": "h2c"},
        {"Connection": "Upgrade", "Upgrade": "websocket"},
    ):
        url = server.exec_url(OUTPUT, ends(0))
        reader, writer = await connect(url)
        writer.write(head(url, headers, "GET"))
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        assert int(answer.split()[1]) in {400, 426}


async def test_a_client_that_breaks_the_rules_is_told_and_cut(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "LINGER_SECONDS", 0.0)
    over = asyncio.Event()

    async def session(streams: ClientStreams) -> int:
        await streams.gone()
        over.set()
        return 0

    client = await opened(server.exec_url(OUTPUT, session), "error", "stdout")
    client.writer.write(spdy.control(1, 0, bytes(10), version=2))
    await in_time(client.until_goaway())
    await in_time(over.wait())
    assert client.peer.goaways == [(3, 1)]
    websocket = await WebSocketClient.open(server.exec_url(OUTPUT, session), "v5.channel.k8s.io")
    websocket.writer.write(b"\xff\xff\xff\xff")
    await in_time(websocket.until_closed())
    assert websocket.core.close_rcvd is not None
    assert websocket.core.close_rcvd.code == 1002


async def test_a_client_that_pings_and_never_reads_is_cut(server: Server) -> None:
    over = asyncio.Event()

    async def session(streams: ClientStreams) -> int:
        await streams.gone()
        over.set()
        return 0

    # Else the kernel keeps MiB of pongs by itself, for which a loaded machine takes its time.
    server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    client = await opened(server.exec_url(OUTPUT, session), "error", "stdout")
    client.stop_reading()

    async def flood() -> None:
        while True:
            client.writer.write(spdy.ping(1) * 4096)
            await client.writer.drain()

    flooding = asyncio.create_task(flood())
    await in_time(over.wait())
    with pytest.raises(ConnectionError):
        await in_time(flooding)


async def test_streams_that_never_come() -> None:
    async with serving(Settings(limits=Limits(creation=0.05))) as server:
        client = await opened(server.exec_url(ALL, echo), "error", "stdin")
        await in_time(client.until_goaway())
        assert client.status()["message"] == "the client has not opened its streams: stderr, stdout missing"
        client = await opened(server.exec_url(ALL, echo), "stdin", "stdout", "stderr")
        await in_time(client.until_goaway())
        assert client.has_ended("stdout")


async def test_a_request_that_never_ends() -> None:
    async with serving(Settings(limits=Limits(head=0.05))) as server:
        reader, writer = await connect(server.exec_url(OUTPUT, ends(0)))
        writer.write(b"GET /")
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_session_without_a_byte_ends() -> None:
    async with serving(Settings(limits=Limits(idle=0.3))) as server:
        cancelled = asyncio.Event()

        async def session(streams: ClientStreams) -> int:
            try:
                await streams.gone()
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return 0

        client = await opened(server.exec_url(ALL, session), "error", "stdin", "stdout", "stderr")
        for _ in range(4):
            client.writer.write(spdy.ping(1))  # is no use of the session
            await asyncio.sleep(0.01)
        await in_time(client.until_goaway())
        assert cancelled.is_set()
        assert client.status()["message"] == "nothing was sent or received for 0.3 s"


async def test_the_end_of_the_daemon_is_told() -> None:
    server = Server(Settings())
    await server.start()
    cancelled = asyncio.Event()

    async def session(streams: ClientStreams) -> int:
        try:
            await streams.gone()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return 0

    clients = [await opened(server.exec_url(OUTPUT, session), "error", "stdout") for _ in range(3)]
    for client in clients:
        while len(client.peer.replied) < 2:
            await client.read_some()
    clients.append(await opened(server.exec_url(OUTPUT, session), "error"))  # and no more
    while len(clients[-1].peer.replied) < 1:
        await clients[-1].read_some()
    _, waiting = await connect(server.exec_url(OUTPUT, session))
    reading = [asyncio.create_task(client.until_goaway()) for client in clients]
    await in_time(server.stop())
    await in_time(asyncio.gather(*reading))
    waiting.close()
    assert cancelled.is_set()
    for client in clients:
        assert client.status()["message"] == "the daemon is stopping"


async def test_who_shows_no_token_takes_no_place(server: Server) -> None:
    url = server.exec_url(OUTPUT, ends(0, b"out"))
    others = [await connect(url) for _ in range(MAX_WAITING + 10)]
    client = await opened(url, "error", "stdout")
    await in_time(client.until_goaway())
    assert client.received("stdout") == b"out"
    for _, writer in others:
        writer.close()


async def test_many_small_pieces_are_no_way_around_the_limit(server: Server) -> None:
    release = asyncio.Event()
    got = bytearray()

    async def session(streams: ClientStreams) -> int:
        await release.wait()
        assert streams.stdin is not None
        while piece := await streams.stdin.read():
            got.extend(piece)
        return 0

    client = await opened(server.exec_url(ALL, session), "error", "stdin", "stdout", "stderr")
    frame = spdy.data(client.roles["stdin"], b"x")
    many = 4 * channels.MAX_HELD // 128
    client.writer.write(frame * many)
    client.end("stdin")
    await asyncio.sleep(0.05)
    release.set()
    await in_time(client.until_goaway())
    assert len(got) == many
