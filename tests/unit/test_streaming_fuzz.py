"""Conversations with bytes changed at random: whatever comes, there is an answer or a close, and nothing grows.

One seed, so that a failure can be seen again. `scripts/test --full` runs 200,000 inputs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

from cri_shim.model.streams import ClientStreams, Connection, Wanted
from cri_shim.streaming import conversation, link
from cri_shim.streaming.server import Server, Settings
from cri_shim.streaming.ticket import Limits
from cri_shim.wire.http_upgrade import MAX_HEAD, BadRequest, HttpUpgrade, Refusal
from cri_shim.wire.mux import DataReceived, Event, Mux, ProtocolFailed, StreamOpened
from cri_shim.wire.spdy import MAX_CONTROL, Spdy
from cri_shim.wire.spdy_headers import MAX_BLOCK
from tests.support import scale, spdy
from tests.support.spdy import FIN, SpdyPeer
from tests.support.streaming_client import head, spdy_head
from tests.unit.test_websocket import Client, channels, tunnel

INPUTS = scale.count(200_000, 4_000)
CONNECTIONS = scale.count(2_000, 60)

ROLES = ("error", "stdin", "stdout", "stderr")


def spdy_conversation() -> bytes:
    peer = SpdyPeer()
    frames = b"".join(peer.open({"streamtype": role}) for role in ROLES)
    frames += spdy.ping(1) + spdy.data(3, b"hello" * 20) + spdy.control(4, 0, bytes(12)) + spdy.reset(7)
    return frames + peer.open({"streamtype": "data", "port": "80", "requestid": "1"}) + spdy.data(3, b"", FIN)


def forward_conversation() -> bytes:
    peer = SpdyPeer()
    headers = {"port": "80", "requestid": "0"}
    frames = peer.open({"streamtype": "error", **headers}, FIN) + peer.open({"streamtype": "data", **headers})
    return frames + spdy.data(3, b"GET / HTTP/1.0\r\n\r\n") + spdy.data(3, b"", FIN) + spdy.goaway()


def channel_conversation() -> bytes:
    client = Client()
    sent = client.binary(b"\x00hello", b'\x04{"Width":1,"Height":2}', b"\xff\x00")
    client.core.send_ping(b"ping")
    client.core.send_binary(b"\x00part", fin=False)
    client.core.send_continuation(b"rest", fin=True)
    client.core.send_close(1000, "bye")
    return sent + client.sent()


def base64_conversation() -> bytes:
    return Client().text(b"0aGVsbG8=", b"4e30=", b"0")


def tunnel_conversation() -> bytes:
    return Client().binary(spdy_conversation(), forward_conversation())


HEAD = spdy_head("http://127.0.0.1/exec/abcdef", "v5.channel.k8s.io", "v4.channel.k8s.io")
CASES: list[tuple[Callable[[], Mux], Callable[[], bytes]]] = [
    (Spdy, spdy_conversation),
    (Spdy, forward_conversation),
    (channels(), channel_conversation),
    (channels(4, in_base64=True), base64_conversation),
    (tunnel, tunnel_conversation),
]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few changes: bytes flipped, set, cut out, doubled, put in, or the rest left out."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(result) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(7):
            case 0:
                result[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in result[at : at + 1])
            case 1:
                result[at : at + size] = rng.randbytes(size)
            case 2:
                del result[at : at + size]
            case 3:
                result[at:at] = result[at : at + size]
            case 4:
                result[at:at] = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * size
            case 5:
                result[at:at] = rng.randbytes(size)
            case _:
                del result[at:]
    return bytes(result)


def cut(rng: random.Random, data: bytes) -> Iterator[bytes]:
    while data:
        size = rng.choice((1, 7, 100, len(data)))
        yield data[:size]
        data = data[size:]


@pytest.mark.timeout(600)
def test_protocols() -> None:
    rng = scale.seeded()
    sources = [(make, source()) for make, source in CASES]
    for number in range(INPUTS * 4 // 5):
        make, source = sources[number % len(sources)]
        data = mutated(rng, source)
        hold(make(), data, cut(rng, data))


def hold(end: Mux, data: bytes, pieces: Iterator[bytes]) -> None:
    """No exception, no more out than came in, and after a failure a last word and then silence."""
    events: list[Event] = []
    answered = 0
    for piece in pieces:
        events += end.receive_data(piece)
        answer = end.data_to_send()
        answered += len(answer)
        for event in events:
            if isinstance(event, StreamOpened):
                end.accept(event.stream)
                end.send_data(event.stream, b"x")
                end.send_end(event.stream)
        if isinstance(end, Spdy):
            assert len(end._held) < 8 + MAX_CONTROL
    assert sum(len(event.data) for event in events if isinstance(event, DataReceived)) <= len(data)
    for event in events:
        if isinstance(event, StreamOpened):
            assert sum(len(name) + len(value) for name, value in event.headers.items()) < MAX_BLOCK
    assert answered <= 4 * len(data) + 200
    failures = [event for event in events if isinstance(event, ProtocolFailed)]
    if failures:
        assert events[-1] is failures[0], data
        assert answered or end.send_goodbye(), data
        assert end.receive_data(data) == []


@pytest.mark.timeout(600)
def test_requests() -> None:
    rng = scale.seeded()
    for _ in range(INPUTS // 5):
        data = mutated(rng, HEAD)
        http, refusal = HttpUpgrade(), Refusal(404, b"")
        fed = 0
        try:
            for piece in cut(rng, data):
                fed += len(piece)
                if http.receive_data(piece) is not None:
                    break
        except BadRequest as bad:
            refusal = bad.refusal
        assert fed < MAX_HEAD
        assert http.refuse(refusal).startswith(b"HTTP/1.1 %d " % refusal.status), data


@pytest.mark.timeout(900)
async def test_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a server that listens: every connection comes to its end, and every session with it."""
    monkeypatch.setattr(link, "LINGER_SECONDS", 0.0)
    monkeypatch.setattr(link, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(conversation, "LEFT_SECONDS", 0.01)
    rng = scale.seeded()
    ends = Ends()
    server = Server(Settings(limits=Limits(head=0.1, creation=0.1, idle=0.1)))
    await server.start()
    for number in range(CONNECTIONS):
        wanted = Wanted(stdin=True, stdout=True, stderr=True, tty=False)
        if number % 2:
            url = server.exec_url(wanted, ends.session)
            kinds = (spdy_head(url, "v4.channel.k8s.io"), spdy_conversation()), (upgrade(url), channel_conversation())
        else:
            url = server.port_forward_url((), ends.connect, lambda: None)
            tunnelled = upgrade(url, "SPDY/3.1+portforward.k8s.io"), tunnel_conversation()
            kinds = (spdy_head(url, "portforward.k8s.io"), forward_conversation()), tunnelled
        data = b"".join(rng.choice(kinds))
        await converse(url, mutated(rng, data) if rng.random() < 0.3 else kept_head(rng, data), stays=number % 3 == 0)
    await asyncio.wait_for(server.stop(), 30)
    assert ends.begun > CONNECTIONS // 4
    assert ends.running == 0
    assert not server._sessions
    assert not server._waiting


class Ends:
    """What is behind the server: sessions that echo, and a pod that does."""

    def __init__(self) -> None:
        self.begun = self.running = 0

    async def session(self, streams: ClientStreams) -> int:
        self.begun += 1
        self.running += 1
        try:
            assert streams.stdin is not None
            assert streams.stdout is not None
            while piece := await streams.stdin.read():
                await streams.stdout.write(piece)
        finally:
            self.running -= 1
        return 0

    async def connect(self, _port: int) -> Connection:
        self.begun += 1
        self.running += 1
        return Echo(self)


class Echo:
    """A `Connection` that gives back what it gets."""

    def __init__(self, ends: Ends) -> None:
        self._ends: Ends | None = ends
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue()

    async def read(self) -> bytes:
        return await self._pieces.get()

    async def write(self, data: bytes) -> None:
        self._pieces.put_nowait(data)

    async def close_write(self) -> None:
        self._pieces.put_nowait(b"")

    def close(self) -> None:
        if self._ends is not None:
            self._ends.running -= 1
            self._ends = None


def upgrade(url: str, protocol: str = "v5.channel.k8s.io") -> bytes:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    headers |= {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Protocol": protocol}
    return head(url, headers, "GET")


def kept_head(rng: random.Random, data: bytes) -> bytes:
    """Only what follows the request is changed."""
    request, end, frames = data.partition(b"\r\n\r\n")
    return request + end + mutated(rng, frames)


async def converse(url: str, data: bytes, *, stays: bool) -> None:
    """A client that says all at once; one that `stays` leaves the end to the server."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(data)
    if not stays:
        writer.write_eof()
    try:
        while await asyncio.wait_for(reader.read(65536), 30):
            pass
    except ConnectionError:
        pass
    writer.close()
