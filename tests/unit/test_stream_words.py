"""The words around streams: HTTP requests to upgrade, the choice of a protocol, statuses, sizes, pairs."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_shim.model.streams import TerminalSize, Wanted
from cri_shim.wire.http_upgrade import BadRequest, HttpUpgrade, Refusal, Request
from cri_shim.wire.negotiation import PORT_FORWARD, REMOTE_COMMAND, Chosen, Offer, choose
from cri_shim.wire.portforward import BadStream, Pair, Pairing, channels, greeting
from cri_shim.wire.remotecommand import (
    CHANNELS,
    FROM_CLIENT,
    Role,
    SizeParser,
    exit_report,
    expected,
    failure_report,
)

HEAD = b"POST /exec/abc?x=/y HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: SPDY/3.1\r\n"
HEAD += b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\nx-stream-protocol-version: v3.channel.k8s.io,b\r\n\r\n"


def test_a_request_whole_and_byte_by_byte() -> None:
    whole, pieces = HttpUpgrade(), HttpUpgrade()
    request = whole.receive_data(HEAD + b"\x80\x03more")
    for byte in HEAD[:-1]:
        assert pieces.receive_data(bytes((byte,))) is None
    assert pieces.receive_data(HEAD[-1:]) == request
    assert whole.trailing == b"\x80\x03more"
    assert pieces.trailing == b""
    assert request is not None
    assert (request.method, request.target, request.path) == ("POST", "/exec/abc?x=/y", "/exec/abc")
    assert request.words("connection") == ["keep-alive", "Upgrade"]
    assert request.words("x-stream-protocol-version") == ["v4.channel.k8s.io", "v3.channel.k8s.io", "b"]
    assert request.words("absent") == []
    assert whole.switch([("upgrade", "SPDY/3.1")]) == b"HTTP/1.1 101 Switching Protocols\r\nupgrade: SPDY/3.1\r\n\r\n"


@given(st.binary(min_size=1, max_size=300))
def test_any_bytes_are_a_request_a_part_of_one_or_refused(data: bytes) -> None:
    http = HttpUpgrade()
    refusal = Refusal(404, b"")
    try:
        http.receive_data(data)
    except BadRequest as bad:
        refusal = bad.refusal
    assert 400 <= refusal.status < 506
    assert http.refuse(refusal).startswith(b"HTTP/1.1 %d " % refusal.status)


def test_a_refusal() -> None:
    http = HttpUpgrade()
    http.receive_data(HEAD)
    answer = http.refuse(Refusal(403, b'{"a":1}', (("x-a", "b"), ("x-a", "c"))))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 403 Forbidden", b"content-type: application/json", b"content-length: 7", b"connection: close",
        b"x-a: b", b"x-a: c",
    ]  # fmt: skip
    assert body == b'{"a":1}'


def asked(**headers: str) -> Request:
    return Request("GET", "/", tuple((name.replace("_", "-"), value) for name, value in headers.items()))


SPDY = {"connection": "Upgrade", "upgrade": "SPDY/3.1"}
WEBSOCKET = {"connection": "keep-alive, upgrade", "upgrade": "WebSocket"}


def spdy(versions: str) -> dict[str, str]:
    return SPDY | {"x_stream_protocol_version": versions}


def websocket(versions: str) -> dict[str, str]:
    return WEBSOCKET | {"sec_websocket_protocol": versions}


@pytest.mark.parametrize(
    ("headers", "offer", "name", "version"),
    [
        (spdy("v5.channel.k8s.io, v4.channel.k8s.io"), REMOTE_COMMAND, "v5.channel.k8s.io", 5),
        (spdy("v6.channel.k8s.io,v2.channel.k8s.io"), REMOTE_COMMAND, "v2.channel.k8s.io", 2),
        (spdy("channel.k8s.io"), REMOTE_COMMAND, "channel.k8s.io", 1),
        (spdy("portforward.k8s.io"), PORT_FORWARD, "portforward.k8s.io", 0),
        (WEBSOCKET, REMOTE_COMMAND, "", 1),
        (WEBSOCKET, PORT_FORWARD, "", 0),
        (websocket("v5.channel.k8s.io"), REMOTE_COMMAND, "v5.channel.k8s.io", 5),
        (websocket("x, v4.base64.channel.k8s.io"), REMOTE_COMMAND, "v4.base64.channel.k8s.io", 4),
        (websocket("SPDY/3.1+portforward.k8s.io"), PORT_FORWARD, "SPDY/3.1+portforward.k8s.io", 0),
    ],
)
def test_the_first_that_both_know(headers: dict[str, str], offer: Offer, name: str, version: int) -> None:
    chosen = choose(asked(**headers), offer)
    assert isinstance(chosen, Chosen)
    assert chosen.is_websocket == (headers["upgrade"] == "WebSocket")
    assert (chosen.subprotocol.name, chosen.subprotocol.version) == (name, version)
    assert chosen.subprotocol.in_base64 == ("base64" in name)
    assert chosen.subprotocol.is_tunnel == name.startswith("SPDY")


@pytest.mark.parametrize(
    ("headers", "offer", "status"),
    [
        ({}, REMOTE_COMMAND, 400),
        (SPDY, REMOTE_COMMAND, 400),
        (spdy(""), REMOTE_COMMAND, 400),
        ({"x_stream_protocol_version": "v4.channel.k8s.io"}, REMOTE_COMMAND, 400),
        (spdy("portforward.k8s.io"), REMOTE_COMMAND, 403),
        (spdy("v4.channel.k8s.io"), PORT_FORWARD, 403),
        (websocket("SPDY/3.1+portforward.k8s.io"), REMOTE_COMMAND, 403),
        (websocket("v5.channel.k8s.io"), PORT_FORWARD, 403),
    ],
)
def test_nothing_in_common(headers: dict[str, str], offer: Offer, status: int) -> None:
    refusal = choose(asked(**headers), offer)
    assert isinstance(refusal, Refusal)
    assert refusal.status == status
    names = {subprotocol.name for subprotocol in (*offer.spdy, *offer.websocket)}
    assert {value for name, value in refusal.headers if name == "x-accepted-stream-protocol-versions"} <= names
    assert bool(refusal.headers) == (status == 403)


def test_roles_and_their_channels() -> None:
    numbers = {Role.STDIN: 0, Role.STDOUT: 1, Role.STDERR: 2, Role.ERROR: 3, Role.RESIZE: 4}
    assert numbers == CHANNELS
    assert {0, 4} == FROM_CLIENT
    everything = Wanted(stdin=True, stdout=True, stderr=True, tty=True)
    assert expected(everything, 4) == set(Role)
    assert expected(everything, 2) == set(Role) - {Role.RESIZE}
    assert expected(Wanted(stdin=False, stdout=True, stderr=False, tty=False), 5) == {Role.ERROR, Role.STDOUT}


def test_reports_can_be_read_whatever_is_in_them() -> None:
    assert json.loads(failure_report("no \udcff file", 4))["message"] == "no \udcff file"
    assert failure_report("no \udcff file", 3) == b"no ? file"
    assert exit_report(0, 3) == b""
    assert exit_report(1, 1) == b"command terminated with exit code 1"


@given(st.lists(st.tuples(st.integers(1, 65535), st.integers(1, 65535)), min_size=1, max_size=9), st.integers(1, 30))
def test_sizes_cut_anywhere(sizes: list[tuple[int, int]], cut: int) -> None:
    text = b"\n".join(json.dumps({"Width": width, "Height": height}).encode() for width, height in sizes)
    parser = SizeParser()
    assert parser.feed(text) == TerminalSize(*sizes[-1])
    seen = [parser.feed(text[start : start + cut]) for start in range(0, len(text), cut)]
    assert [size for size in seen if size is not None][-1] == TerminalSize(*sizes[-1])


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"}", b'{"Width":0,"Height":1}', b'{"Width":1}', b'{"Width":65536,"Height":1}', b"[1]}", b"\xff}"],
)
def test_what_is_no_size_is_left_out(text: bytes) -> None:
    assert SizeParser().feed(text) is None
    parser = SizeParser()
    parser.feed(text + b"}")
    assert parser.feed(b'{"Width":80,"Height":24}') == TerminalSize(80, 24)


def test_no_size_grows_without_end() -> None:
    parser = SizeParser()
    for _ in range(100):
        assert parser.feed(bytes(1000)) is None
    assert len(parser._held) <= SizeParser.LONGEST


def of(kind: str, port: int = 80, request: str = "") -> dict[str, str]:
    return {"streamtype": kind, "port": str(port)} | ({"requestid": request} if request else {})


def test_pairs() -> None:
    pairing = Pairing()
    assert pairing.opened(1, of("error", request="a")) is None
    assert pairing.opened(3, of("data", 81, request="b")) is None
    assert pairing.opened(5, of("data", request="a")) == Pair(80, data=5, error=1)
    assert pairing.opened(7, of("error")) is None
    assert pairing.opened(9, of("data")) == Pair(80, data=9, error=7)
    assert not pairing.closed(1)
    assert pairing.closed(3)
    assert not pairing.closed(3)
    assert pairing.opened(11, of("error", 81, request="b")) is None


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "streamtype '' is neither error nor data"),
        (of("nonsense"), "'nonsense' is neither"),
        (of("data", 0), "port '0' is not between 1 and 65535"),
        (of("data", 65536), "port '65536' is not"),
        (of("data", -1), "port '-1' is not"),
        ({"streamtype": "data"}, "port '' is not"),
        ({"streamtype": "data", "port": "٣"}, "is not between"),
        (of("error", request="a"), "request a has a stream of type error already, or another port"),
        (of("data", 81, request="a"), "or another port"),
        (of("data", request="a" * 257), "a request id of 257 characters, at most 256"),
    ],
)
def test_streams_that_fit_no_pair(headers: dict[str, str], words: str) -> None:
    pairing = Pairing()
    pairing.opened(1, of("error", request="a"))
    with pytest.raises(BadStream, match=words):
        pairing.opened(3, headers)
    assert pairing.opened(5, of("data", request="a")) == Pair(80, data=5, error=1)


def test_numbered_channels() -> None:
    assert channels((80, 8080)) == [Pair(80, data=0, error=1), Pair(8080, data=2, error=3)]
    assert greeting(8080) == b"\x90\x1f"
