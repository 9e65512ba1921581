"""WebSocket: handshakes, channels in every form and the tunnel, whole, byte by byte, and joined with a client's end."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from cri_shim.model.streams import PIECE_BYTES
from cri_shim.wire.http_upgrade import Request
from cri_shim.wire.mux import DataReceived, Event, Mux, PeerLeft, ProtocolFailed, StreamEnded, StreamOpened
from cri_shim.wire.websocket import MAX_MESSAGE, Channels, HandshakeRefused, Tunnel, WebSocket
from tests.support import spdy
from tests.support.events import in_both_ways, joined
from tests.support.spdy import SpdyPeer

KEY = ("sec-websocket-key", base64.b64encode(bytes(16)).decode())
HEADERS = (
    ("host", "x"),
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    KEY,
    ("sec-websocket-protocol", "SPDY/3.1+x, v5.channel.k8s.io"),
    ("sec-websocket-extensions", "permessage-deflate"),
)


def opened(subprotocol: str = "") -> WebSocket:
    return WebSocket(Request("GET", "/exec/t", HEADERS), subprotocol)


class Client:
    """Frames of a client, and what it makes of the server's."""

    def __init__(self) -> None:
        self.core = ClientProtocol(parse_uri("ws://x/"), state=State.OPEN)
        self.messages: list[bytes] = []
        self.pongs: list[bytes] = []

    def sent(self) -> bytes:
        return b"".join(self.core.data_to_send())

    def binary(self, *messages: bytes) -> bytes:
        for message in messages:
            self.core.send_binary(message)
        return self.sent()

    def text(self, *messages: bytes) -> bytes:
        for message in messages:
            self.core.send_text(message)
        return self.sent()

    def receive(self, data: bytes) -> None:
        self.core.receive_data(data)
        for frame in self.core.events_received():
            assert isinstance(frame, Frame)
            if frame.opcode in {Opcode.BINARY, Opcode.TEXT}:
                self.messages.append(bytes(frame.data))
            elif frame.opcode is Opcode.PONG:
                self.pongs.append(bytes(frame.data))


def channels(
    version: int = 5, *, in_base64: bool = False, greetings: dict[int, bytes] | None = None
) -> Callable[[], Mux]:
    return lambda: Channels(opened(), in_base64=in_base64, version=version, readable=[0, 4], greetings=greetings or {})


def tunnel() -> Mux:
    return Tunnel(opened("SPDY/3.1+portforward.k8s.io"))


@pytest.mark.parametrize("name", ["", "v5.channel.k8s.io", "SPDY/3.1+portforward.k8s.io"])
def test_the_handshake_names_the_protocol_and_no_extension(name: str) -> None:
    lines = opened(name).handshake.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 101 Switching Protocols"
    assert "Sec-WebSocket-Accept: ICX+Yqv66kxgM0FcWaLWlFLwTAI=" in lines
    assert (f"Sec-WebSocket-Protocol: {name}" in lines) == bool(name)
    assert "xtension" not in "".join(lines)


@pytest.mark.parametrize("without", ["connection", "upgrade", "sec-websocket-version", "sec-websocket-key"])
def test_no_handshake_without(without: str) -> None:
    headers = tuple(header for header in HEADERS if header[0] != without)
    with pytest.raises(HandshakeRefused) as refused:
        WebSocket(Request("GET", "/exec/t", headers), "")
    assert refused.value.answer.split()[1] in {b"400", b"426"}


def test_channels_of_a_client() -> None:
    client = Client()
    sent = client.binary(b"\x00hello", b"", b"\x00", b"\x01not mine", b"\x07", b"\x04size", b"\x00!", b"\xff\x07")
    events, answers, _ = in_both_ways(channels(), sent + client.text(b"\x00text"))
    assert events == [DataReceived(0, b"hello"), DataReceived(4, b"size"), DataReceived(0, b"!text")]
    assert answers == b""


def test_a_channel_ends_in_v5_only() -> None:
    client = Client()
    sent = client.binary(b"\x00hello", b"\xff\x00", b"\xff\x00", b"\x00late", b"\xff", b"\xff\x01", b"\x04size")
    events, _, _ = in_both_ways(channels(), sent)
    assert events == [DataReceived(0, b"hello"), StreamEnded(0), DataReceived(4, b"size")]
    events, _, _ = in_both_ways(channels(4), sent)
    assert events == [DataReceived(0, b"hellolate"), DataReceived(4, b"size")]


def test_base64() -> None:
    client = Client()
    events, _, end = in_both_ways(channels(4, in_base64=True), client.text(b"0aGVsbG8=", b"4", b"0", b"9aGVsbG8="))
    assert events == [DataReceived(0, b"hello")]
    client.receive(end.send_data(1, b"out") + end.send_data(3, b""))
    assert client.messages == [b"1b3V0", b"3"]


@pytest.mark.parametrize("message", [b"0aGVsbG8", b"0????", b"0aGVsbG8=="])
def test_what_is_not_base64(message: bytes) -> None:
    client = Client()
    events, answers, end = in_both_ways(channels(4, in_base64=True), client.text(b"0aGVsbG8=", message, b"0aGVsbG8="))
    assert events == [DataReceived(0, b"hello"), ProtocolFailed("a message that is not base64")]
    client.receive(answers)
    assert client.core.close_rcvd is not None
    assert client.core.close_rcvd.code == 1007
    assert end.send_goodbye() == end.send_data(1, b"x") == b""
    assert end.receive_data(Client().text(b"0aGVsbG8=")) == []


def test_greetings_come_first_and_once() -> None:
    client, end = Client(), channels(greetings={1: b"", 2: b"\x50\x00"})()
    assert end.receive_data(client.binary(b"\x00x")) == [DataReceived(0, b"x")]
    client.receive(end.data_to_send())
    assert client.messages == [b"\x01", b"\x02\x50\x00"]
    assert end.data_to_send() == b""


def test_a_message_in_fragments_with_pings_between() -> None:
    client = Client()
    client.core.send_binary(b"\x00one", fin=False)
    client.core.send_ping(b"p")
    client.core.send_continuation(b"", fin=False)
    client.core.send_continuation(b"two", fin=True)
    events, answers, _ = in_both_ways(channels(), client.sent())
    assert events == [DataReceived(0, b"onetwo")]
    client.receive(answers)
    assert client.pongs == [b"p"]


def test_large_messages_come_in_pieces() -> None:
    content = bytes(range(256)) * 1024
    events = channels()().receive_data(Client().binary(b"\x00" + content))
    pieces = [event.data for event in events if isinstance(event, DataReceived)]
    assert b"".join(pieces) == content
    assert {len(piece) for piece in pieces} == {PIECE_BYTES}


def test_who_closes_first() -> None:
    client = Client()
    client.core.send_close(1000)
    events, answers, end = in_both_ways(channels(), client.sent())
    assert events == [PeerLeft()]
    client.receive(answers)
    assert client.core.close_rcvd is not None
    assert end.send_goodbye() == end.send_data(1, b"x") == b""

    client, end = Client(), channels()()
    client.receive(end.send_data(3, b"status") + end.send_goodbye() + end.send_data(1, b"late"))
    assert client.messages == [b"\x03status"]
    assert client.core.close_rcvd is not None
    assert client.core.close_rcvd.code == 1000
    assert end.receive_data(client.sent()) == [PeerLeft()]


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x82\x00", 1002),  # not masked
        (b"\xc2\x80\0\0\0\0", 1002),  # a reserved bit
        (b"\x83\x80\0\0\0\0", 1002),  # an unknown opcode
        (b"\x80\x80\0\0\0\0", 1002),  # continues nothing
        (b"\x09\x80\0\0\0\0", 1002),  # a control frame in fragments
        (b"\x89\xfe\x00\x7e\0\0\0\0" + bytes(126), 1002),  # a long one
        (b"\x82\xff" + (MAX_MESSAGE + 1).to_bytes(8, "big"), 1009),
        (b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff", 1009),
    ],
)
@pytest.mark.parametrize("make", [channels(), tunnel], ids=["channels", "tunnel"])
def test_what_is_no_frame(make: Callable[[], Mux], frame: bytes, code: int) -> None:
    client = Client()
    events, answers, end = in_both_ways(make, frame)
    assert len(events) == 1
    assert isinstance(events[0], ProtocolFailed)
    client.receive(answers)
    assert client.core.close_rcvd is not None
    assert client.core.close_rcvd.code == code
    assert end.receive_data(frame) == []
    assert end.data_to_send() == end.send_goodbye() == b""


def test_a_tunnel_has_no_borders() -> None:
    client, peer = Client(), SpdyPeer()
    frames = peer.open({"a": "b"}) + spdy.data(1, b"hello") + spdy.ping(1) + spdy.data(1, b"", spdy.FIN)
    for size in (1, 7, 1000):
        messages = [frames[start : start + size] for start in range(0, len(frames), size)]
        events, answers, end = in_both_ways(tunnel, client.binary(*messages))
        assert events == [StreamOpened(1, {"a": "b"}), DataReceived(1, b"hello"), StreamEnded(1)]
        client.receive(answers + end.accept(1) + end.send_data(1, b"out") + end.send_end(1) + end.send_reset(1))
        inner = SpdyPeer()
        for message in client.messages:
            inner.receive(message)
        assert (inner.pings, inner.replied, bytes(inner.received[1]), inner.ended) == ([1], {1}, b"out", [1])
        client.messages.clear()


def test_a_tunnel_fails_with_what_is_in_it() -> None:
    client = Client()
    events, answers, end = in_both_ways(tunnel, client.binary(spdy.control(6, 0, b""), spdy.ping(1)))
    assert len(events) == 1
    assert isinstance(events[0], ProtocolFailed)
    client.receive(answers + end.send_goodbye())
    inner = SpdyPeer()
    inner.receive(b"".join(client.messages))
    assert inner.goaways == [(0, 1)]
    assert client.core.close_rcvd is not None


@pytest.mark.parametrize("make", [channels(), tunnel], ids=["channels", "tunnel"])
def test_signs_of_life(make: Callable[[], Mux]) -> None:
    client, end = Client(), make()
    client.receive(end.still_here())
    assert client.pongs == [b""]
    client.receive(end.send_goodbye())
    assert end.still_here() == b""


def test_goodbye_in_a_tunnel() -> None:
    client, end = Client(), tunnel()
    client.receive(end.send_goodbye())
    inner = SpdyPeer()
    inner.receive(b"".join(client.messages))
    assert inner.goaways == [(0, 0)]
    assert client.core.close_rcvd is not None


class TwoEnds(RuleBasedStateMachine):
    """A client and the channels of v5 joined; the model is what each has been told to do."""

    def __init__(self) -> None:
        super().__init__()
        self.client, self.server = Client(), channels()()
        self.wire = b""
        self.events: list[Event] = []
        self.expected: list[Event] = []
        self.open = {0, 4}
        self.written: list[bytes] = []
        self.pings: list[bytes] = []

    @rule(channel=st.integers(0, 254), content=st.binary(max_size=99), cut=st.integers(0, 99))
    def send(self, channel: int, content: bytes, cut: int) -> None:
        message = bytes((channel,)) + content
        if 0 < cut < len(message):
            self.client.core.send_binary(message[:cut], fin=False)
            self.client.core.send_continuation(message[cut:], fin=True)
        else:
            self.client.core.send_binary(message)
        self.wire += self.client.sent()
        if channel in self.open and content:
            self.expected.append(DataReceived(channel, content))

    @rule(channel=st.integers(0, 5))
    def end(self, channel: int) -> None:
        self.wire += self.client.binary(bytes((255, channel)))
        if channel in self.open:
            self.open.discard(channel)
            self.expected.append(StreamEnded(channel))

    @rule(data=st.binary(max_size=9))
    def ping(self, data: bytes) -> None:
        self.client.core.send_ping(data)
        self.wire += self.client.sent()
        self.pings.append(data)

    @rule(channel=st.integers(1, 3), content=st.binary(max_size=99))
    def write(self, channel: int, content: bytes) -> None:
        self.client.receive(self.server.send_data(channel, content))
        self.written.append(bytes((channel,)) + content)
        assert self.client.messages == self.written

    @rule(cut=st.integers(1, 40))
    def deliver(self, cut: int) -> None:
        for start in range(0, len(self.wire), cut):
            self.events += self.server.receive_data(self.wire[start : start + cut])
            self.client.receive(self.server.data_to_send())
        self.wire = b""
        assert joined(self.events) == joined(self.expected)
        assert self.client.pongs == self.pings


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@given(st.binary(max_size=300), st.integers(1, 50), st.sampled_from([channels(), channels(4, in_base64=True), tunnel]))
def test_any_bytes_cut_anywhere_mean_the_same(data: bytes, cut: int, make: Callable[[], Mux]) -> None:
    whole, cut_up = make(), make()
    events = joined(whole.receive_data(data))
    pieces: list[Event] = []
    for start in range(0, len(data), cut):
        pieces += cut_up.receive_data(data[start : start + cut])
    assert joined(pieces) == events
    assert cut_up.data_to_send() == whole.data_to_send()
