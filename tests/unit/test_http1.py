"""HTTP/1.1 without sockets: both ends joined, and what a server says to bytes that are no HTTP."""

from __future__ import annotations

import pytest

from cri_shim.wire.http1 import (
    MAX_HEAD,
    BrokenMessage,
    Client,
    Closed,
    End,
    Event,
    Request,
    Response,
    Server,
    UnsendableMessage,
)

HOST = ("host", b"h")


def events(peer: Client | Server, data: bytes, size: int = 1 << 20) -> list[Event]:
    """What a peer makes of bytes that come in pieces; neighbouring pieces of a body are joined."""
    found: list[Event] = []
    for at in range(0, len(data), size):
        peer.receive(data[at : at + size])
        while (event := peer.next_event()) is not None and not isinstance(event, Closed):
            if isinstance(event, bytes) and found and isinstance(found[-1], bytes):
                found[-1] += event
            else:
                found.append(event)
            if isinstance(event, End):
                break
    return found


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_request_and_its_response(size: int) -> None:
    client, server = Client(), Server()
    request = Request("POST", "/a?b", (HOST, ("content-length", b"5")))
    sent = client.request(request) + client.data(b"he") + client.data(b"llo") + client.end()
    assert events(server, sent, size) == [request, b"hello", End()]
    back = (
        server.respond(Response(201, (("x-y", b"z "),)), to="POST")
        + server.data(b"a")
        + server.data(b"")
        + server.end()
    )
    answer = (("x-y", b"z"), ("transfer-encoding", b"chunked"))
    assert events(client, back, size) == [Response(201, answer), b"a", End()]
    assert server.begin_again()
    assert not server.has_begun
    server.receive(b"GET ")
    assert (server.next_event(), server.has_begun) == (None, True)


def test_trailers_go_with_chunks_and_are_left_out_elsewhere() -> None:
    for headers, trailers in (((), (("t", b"1"),)), ((("content-length", b"1"),), ())):
        client, server = Client(), Server()
        events(server, client.request(Request("GET", "/", (HOST,))) + client.end())
        back = server.respond(Response(200, headers), to="GET") + server.data(b"x") + server.end((("t", b"1"),))
        assert events(client, back)[-1] == End(trailers)


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_where_there_is_no_body_none_is_sent(method: str, status: int) -> None:
    client, server = Client(), Server()
    events(server, client.request(Request(method, "/", (HOST,))) + client.end())
    head = server.respond(Response(status, ()), to=method)
    assert head.endswith(b"\r\n\r\n")
    assert server.data(b"not wanted") + server.end() == b""


def test_a_client_that_waits_is_told_to_go_on() -> None:
    server = Server()
    server.receive(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n")
    assert isinstance(server.next_event(), Request)
    assert server.waits_for_continue
    assert server.go_on() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert not server.waits_for_continue


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * MAX_HEAD, 431),
    ],
)
def test_what_is_no_request_has_a_status(data: bytes, status: int) -> None:
    server = Server()
    with pytest.raises(BrokenMessage) as caught:
        events(server, data)
    assert caught.value.status == status
    answer = server.refuse(status, "no")
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert answer.endswith(b"\r\n\r\nno\n")
    assert not server.begin_again()


def test_an_end_in_the_middle_is_none() -> None:
    server = Server()
    events(server, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhe")
    server.receive(b"")
    with pytest.raises(BrokenMessage):
        server.next_event()
    idle = Server()
    idle.receive(b"")
    assert idle.next_event() == Closed()


def test_what_is_not_as_announced_cannot_be_sent() -> None:
    server = Server()
    events(server, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    with pytest.raises(UnsendableMessage):
        server.respond(Response(200, (("content-length", b"many"),)), to="GET")


def test_an_old_client_gets_no_chunks() -> None:
    server = Server()
    events(server, b"GET / HTTP/1.0\r\n\r\n")
    answer = server.respond(Response(200, ()), to="GET") + server.data(b"all") + server.end((("t", b"1"),))
    assert answer.endswith(b"\r\n\r\nall")
    assert not server.begin_again()
