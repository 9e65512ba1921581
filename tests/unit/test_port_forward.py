"""Port-forward on loopback: pairs of streams over SPDY, numbered channels, and SPDY in a WebSocket tunnel.

The pod's side is a real TCP server in this process.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from cri_shim.model.errors import FailedPrecondition, Unavailable
from cri_shim.model.streams import Connection
from cri_shim.streaming import channels
from cri_shim.streaming.server import Server, Settings
from cri_shim.streaming.ticket import Limits
from tests.support import spdy
from tests.support.streaming_client import Refused, SpdyClient, WebSocketClient

PROTOCOL = "portforward.k8s.io"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class PodConnection:
    """A `Connection` by asyncio's streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read(self) -> bytes:
        return await self.reader.read(32 << 10)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def close_write(self) -> None:
        self.writer.write_eof()

    def close(self) -> None:
        self.writer.close()


@asynccontextmanager
async def pod(handler: Handler) -> AsyncIterator[Callable[[int], Awaitable[Connection]]]:
    """A `Connect` to a server that handles each connection so, on whatever port is asked for."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        finally:
            writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    address = listener.sockets[0].getsockname()

    async def connect(port: int) -> Connection:
        if port == 1:
            raise FailedPrecondition("nothing listens on port 1")
        return PodConnection(*await asyncio.open_connection(*address))

    async with listener:
        yield connect


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server(Settings(limits=Limits(creation=0.2)))
    await made.start()
    yield made
    await made.stop()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """After the client's end comes a last word: a half close must not cut it off."""
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    await asyncio.sleep(0.01)
    writer.write(b"bye")
    await writer.drain()


def in_time(action: Awaitable[object]) -> Awaitable[object]:
    return asyncio.wait_for(action, 60)


async def until(client: SpdyClient, reached: Callable[[], bool]) -> None:
    while not reached():
        assert await client.read_some(), "the connection ended early"


def pair(client: SpdyClient, port: int, request: str) -> tuple[int, int]:
    """The numbers of data and error stream; the client ends the error stream at once, as client-go does."""
    headers = {"port": str(port), **({"requestid": request} if request else {})}
    error = client.stream("error", **headers)
    client.end("error")
    return client.stream("data", **headers), error


@pytest.mark.parametrize("request_id", ["0", ""])
async def test_a_connection_with_half_close(server: Server, request_id: str) -> None:
    async with pod(echo) as connect:
        client = await SpdyClient.open(server.port_forward_url((), connect, lambda: None), PROTOCOL)
        data, error = pair(client, 80, request_id)
        content = random.Random(3).randbytes(3 << 20)

        async def send() -> None:
            await client.send("data", content)
            client.end("data")

        sending = asyncio.create_task(send())
        await in_time(until(client, lambda: {data, error} <= set(client.peer.ended)))
        await sending
        assert bytes(client.peer.received[data]) == content + b"bye"
        assert not client.peer.received[error]
        assert not client.peer.resets
        await client.close()


async def test_many_connections_at_once_and_one_after_the_other(server: Server) -> None:
    async with pod(echo) as connect:
        client = await SpdyClient.open(server.port_forward_url((), connect, lambda: None), PROTOCOL)
        sent: dict[int, bytes] = {}
        for number in range(60):
            data, _ = pair(client, 1000 + number, str(number))
            sent[data] = b"%d" % number * 1000
            await client.send("data", sent[data])
            client.end("data")
            if number % 20 == 19:
                await in_time(until(client, lambda: set(sent) <= set(client.peer.ended)))
        assert {stream: bytes(client.peer.received[stream]) for stream in sent} == {
            stream: content + b"bye" for stream, content in sent.items()
        }
        await client.close()


async def test_a_port_that_nobody_listens_on_leaves_the_others_alone(server: Server) -> None:
    async with pod(echo) as connect:
        client = await SpdyClient.open(server.port_forward_url((), connect, lambda: None), PROTOCOL)
        good, _ = pair(client, 80, "good")
        bad, error = pair(client, 1, "bad")
        await in_time(until(client, lambda: {bad, error} <= set(client.peer.ended)))
        assert bytes(client.peer.received[error]) == b"nothing listens on port 1"
        client.roles["data"] = good
        await client.send("data", b"still here")
        client.end("data")
        await in_time(until(client, lambda: good in client.peer.ended))
        assert bytes(client.peer.received[good]) == b"still herebye"
        await client.close()


async def test_a_reset_by_the_pod_is_told(server: Server) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with pod(refuse) as connect:
        client = await SpdyClient.open(server.port_forward_url((), connect, lambda: None), PROTOCOL)
        data, error = pair(client, 80, "0")
        await client.send("data", b"x")
        await in_time(until(client, lambda: error in client.peer.ended))
        assert b"the connection to port 80 has broken: " in client.peer.received[error]
        assert client.peer.resets == {data: 5}
        await client.close()


async def test_a_reset_by_the_client_closes_the_connection(server: Server) -> None:
    begun, over = asyncio.Event(), asyncio.Event()

    async def wait(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        assert await reader.read(1) == b"x"
        begun.set()
        await reader.read(1)
        over.set()

    async with pod(wait) as connect:
        client = await SpdyClient.open(server.port_forward_url((), connect, lambda: None), PROTOCOL)
        data, error = pair(client, 80, "0")
        await client.send("data", b"x")
        await in_time(begun.wait())
        client.writer.write(spdy.reset(data))
        await in_time(over.wait())
        await in_time(until(client, lambda: error in client.peer.ended))
        assert not client.peer.received[error]
        await client.close()


async def test_a_client_that_resets_when_the_pod_has_ended_is_told_the_end(server: Server) -> None:
    """As client-go does it: it holds its own connection open until the error stream ends."""

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        await writer.drain()

    async with pod(greet) as connect:
        client = await SpdyClient.open(server.port_forward_url((), connect, lambda: None), PROTOCOL)
        data, error = pair(client, 80, "0")
        await in_time(until(client, lambda: data in client.peer.ended))
        assert error not in client.peer.ended
        client.writer.write(spdy.reset(data))
        await in_time(until(client, lambda: error in client.peer.ended))
        assert client.peer.received[data] == b"hello"
        assert not client.peer.received[error]
        await client.close()


class Stuck:
    """A `Connection` that takes nothing and gives nothing."""

    async def read(self) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def write(self, data: bytes) -> None:
        del data
        await asyncio.Event().wait()

    async def close_write(self) -> None:
        pass

    def close(self) -> None:
        pass


async def test_what_waits_in_connections_that_the_client_resets_counts_no_more(server: Server) -> None:
    async with pod(echo) as connect:

        async def some_stuck(port: int) -> Connection:
            return Stuck() if port == 2 else await connect(port)

        client = await SpdyClient.open(server.port_forward_url((), some_stuck, lambda: None), PROTOCOL)
        for number in range(2 * channels.MAX_HELD // (100 << 10)):
            data, _ = pair(client, 2, str(number))
            await client.send("data", bytes(100 << 10))
            client.writer.write(spdy.ping(2 * number + 1))
            await in_time(until(client, lambda: bool(client.peer.pings)))
            client.peer.pings.clear()
            client.writer.write(spdy.reset(data))
        at_once = b""
        for number in range(2 * channels.MAX_HELD // (8 << 10)):
            of_pair = {"port": "2", "requestid": f"at once {number}"}
            at_once += client.peer.open({"streamtype": "error", **of_pair})
            at_once += client.peer.open({"streamtype": "data", **of_pair})
            at_once += spdy.data(client.peer.opened, bytes(8 << 10)) + spdy.reset(client.peer.opened)
        client.writer.write(at_once)
        data, _ = pair(client, 80, "good")
        await client.send("data", b"through")
        client.end("data")
        await in_time(until(client, lambda: data in client.peer.ended))
        assert bytes(client.peer.received[data]) == b"throughbye"
        await client.close()


async def test_the_end_of_the_client_ends_all_connections(server: Server) -> None:
    over = asyncio.Semaphore(0)

    async def wait(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        while await reader.read(1):
            pass
        over.release()

    async with pod(wait) as connect:
        client = await SpdyClient.open(server.port_forward_url((), connect, lambda: None), PROTOCOL)
        for number in range(3):
            pair(client, 80, str(number))
        await client.send("data", b"x")
        await until(client, lambda: len(client.peer.replied) == 6)
        await client.close()
        for _ in range(3):
            await in_time(over.acquire())


@pytest.mark.parametrize(
    "headers",
    [
        {"streamtype": "nonsense", "port": "80"},
        {"streamtype": "data"},
        {"streamtype": "data", "port": "0"},
        {"streamtype": "data", "port": "65536"},
        {"streamtype": "data", "port": "http"},
        {"streamtype": "error", "port": "80", "requestid": "waits"},
        {"streamtype": "data", "port": "81", "requestid": "waits"},
    ],
)
async def test_streams_that_fit_no_pair_are_reset(server: Server, headers: dict[str, str]) -> None:
    async with pod(echo) as connect:
        client = await SpdyClient.open(server.port_forward_url((), connect, lambda: None), PROTOCOL)
        waits = client.stream("error", port="80", requestid="waits")
        client.writer.write(client.peer.open(headers))
        await in_time(until(client, lambda: client.peer.opened in client.peer.resets))
        assert client.peer.resets == {client.peer.opened: 3}
        # Its partner never comes: it is dropped, and the connection goes on.
        await in_time(until(client, lambda: waits in client.peer.resets))
        data, _ = pair(client, 80, "good")
        client.end("data")
        await in_time(until(client, lambda: data in client.peer.ended))
        await client.close()


async def test_a_pod_that_is_not_ready(server: Server) -> None:
    def check() -> None:
        raise Unavailable("the pod has stopped")

    async with pod(echo) as connect:
        with pytest.raises(Refused) as refused:
            await SpdyClient.open(server.port_forward_url((), connect, check), PROTOCOL)
        assert refused.value.status == 503


async def test_goaway_of_the_client_ends_the_session_with_its_last_pair(server: Server) -> None:
    async with pod(echo) as connect:
        client = await SpdyClient.open(server.port_forward_url((), connect, lambda: None), PROTOCOL)
        data, _ = pair(client, 80, "0")
        client.writer.write(spdy.goaway())
        await client.send("data", b"x")
        client.end("data")
        await in_time(client.until_goaway())
        assert bytes(client.peer.received[data]) == b"xbye"


async def test_the_end_of_the_daemon_closes_the_pods_side() -> None:
    over = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        over.set()

    server = Server(Settings())
    await server.start()
    async with pod(wait) as connect:
        client = await SpdyClient.open(server.port_forward_url((), connect, lambda: None), PROTOCOL)
        pair(client, 80, "0")
        await until(client, lambda: len(client.peer.replied) == 2)
        reading = asyncio.create_task(client.until_goaway())
        await in_time(server.stop())
        await in_time(reading)
        await in_time(over.wait())


@pytest.mark.parametrize("protocols", [(), ("v4.channel.k8s.io",), ("v4.base64.channel.k8s.io",)])
async def test_numbered_channels(server: Server, protocols: tuple[str, ...]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(5) == b"hello"
        writer.write(b"world")

    async with pod(answer) as connect:
        url = server.port_forward_url((8080, 1), connect, lambda: None)
        client = await WebSocketClient.open(url, *protocols)
        await client.say(0, b"hello")
        await in_time(client.until_closed())
        assert client.received(0) == struct.pack("<H", 8080) + b"world"
        assert client.received(1) == struct.pack("<H", 8080)
        assert client.received(2) == struct.pack("<H", 1)
        assert client.received(3) == struct.pack("<H", 1) + b"nothing listens on port 1"


async def test_spdy_in_a_websocket(server: Server) -> None:
    async with pod(echo) as connect:
        url = server.port_forward_url((), connect, lambda: None)
        client = await WebSocketClient.open(url, "SPDY/3.1+portforward.k8s.io")
        peer = spdy.SpdyPeer()
        headers = {"port": "80", "requestid": "0"}
        frames = peer.open({"streamtype": "error", **headers}) + peer.open({"streamtype": "data", **headers})
        content = random.Random(4).randbytes(1 << 20)
        for start in range(0, len(content), 32 << 10):
            frames += spdy.data(3, content[start : start + (32 << 10)])
        frames += spdy.data(3, b"", spdy.FIN) + spdy.ping(1)

        async def send() -> None:
            # Borders of messages mean nothing.
            for start in range(0, len(frames), 50_001):
                client.message(frames[start : start + 50_001])
                await client.writer.drain()

        sending = asyncio.create_task(send())
        while not {1, 3} <= set(peer.ended):
            assert await client.read_some()
            for message in client.messages:
                peer.receive(message)
            client.messages.clear()
        await sending
        assert bytes(peer.received[3]) == content + b"bye"
        assert peer.pings == [1]
        client.core.send_close(1000)
        client.flush()
        await in_time(client.until_closed())
        assert client.core.close_code == 1000
