"""`wasi:http/types` by itself: the rules on fields and messages, bodies over socket pairs, errors."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from cri_shim.wire.http1 import Client, End, Request, Response, Server
from handlers.wasmtime.sockets import Stopped
from handlers.wasmtime.wasip2.http_bodies import IncomingBody, OutgoingBody
from handlers.wasmtime.wasip2.http_channel import BUFFER, Channel, Incoming, Outgoing, prepared
from handlers.wasmtime.wasip2.http_errors import HttpError, describe, http_error_code, status_of
from handlers.wasmtime.wasip2.http_exchange import Exchange
from handlers.wasmtime.wasip2.http_fields import FORBIDDEN, Fields, visible
from handlers.wasmtime.wasip2.http_messages import (
    IncomingRequest,
    OutgoingRequest,
    OutgoingResponse,
    ResponseOutparam,
    method_case,
    method_word,
)
from handlers.wasmtime.wasip2.interface import Failure, Trap
from handlers.wasmtime.wasip2.streams import IoError, StreamClosed, StreamFailed
from handlers.wasmtime.wasip2.waiter import Left, Timer, Waiter

HOST = ("host", b"h")


@pytest.fixture
def waiter() -> Iterator[Waiter]:
    with closing(Waiter(contextlib.nullcontext)) as made:
        yield made


def failure(call: Any, *arguments: object) -> object:
    with pytest.raises(Failure) as caught:
        call(*arguments)
    return caught.value.value


# Fields.


def test_names_of_fields_have_no_case() -> None:
    fields = Fields.from_list([("X-One", b"1"), ("x-two", b"2"), ("x-ONE", b"3")])
    assert fields.get("x-one") == fields.get("X-ONE") == [b"1", b"3"]
    assert fields.has("X-Two")
    assert not fields.has("x-three")
    fields.set("X-TWO", [b"a", b"b"])
    fields.delete("x-One")
    fields.append("X-One", b"")
    assert fields.entries() == [("x-two", b"a"), ("x-two", b"b"), ("x-one", b"")]
    assert fields.get("no name") == []


def test_bad_fields_are_refused_and_change_nothing() -> None:
    fields = Fields.from_list([("a", b"1")])
    for name in ("", "a b", "a:", "ä", "a\n"):
        assert failure(fields.append, name, b"") == ("invalid-syntax", None)
        assert failure(fields.delete, name) == ("invalid-syntax", None)
    for value in (b"\n", b"a\r\nx: y", b"\0", b"\x7f"):
        assert failure(fields.set, "a", [b"good", value]) == ("invalid-syntax", None)
        assert failure(Fields.from_list, [("a", value)]) == ("invalid-syntax", None)
    for name in FORBIDDEN:
        assert failure(fields.append, name.upper(), b"") == ("forbidden", None)
        assert failure(Fields.from_list, [(name, b"")]) == ("forbidden", None)
    assert fields.entries() == [("a", b"1")]


def test_what_has_been_received_or_sent_is_immutable_and_its_copies_are_not(waiter: Waiter) -> None:
    received = visible((("a", b"1"), HOST, ("connection", b"close")))
    assert received.entries() == [("a", b"1")]
    sent = Fields()
    response = OutgoingResponse(waiter, sent)
    for fields in (received, sent, response.headers()):
        assert failure(fields.append, "b", b"") == ("immutable", None)
        assert failure(fields.set, "b", []) == ("immutable", None)
        assert failure(fields.delete, "a") == ("immutable", None)
        fields.clone().append("b", b"")


# Messages.


def test_methods_and_their_words() -> None:
    for case, word in ((("get", None), "GET"), (("patch", None), "PATCH"), (("other", "BREW"), "BREW")):
        assert method_case(word) == case
        assert method_word(case) == word
    assert method_case("get") == ("other", "get")


@pytest.mark.parametrize(
    ("target", "path", "authority"),
    [
        ("/a/b?c=d", "/a/b?c=d", "h"),
        ("http://other:81/a?b", "/a?b", "other:81"),
        ("http://other?b", "/?b", "other"),
        ("*", "*", "h"),
    ],
)
def test_what_a_target_says(waiter: Waiter, target: str, path: str, authority: str) -> None:
    with exchanges() as (exchange, _):
        body = IncomingBody(waiter, exchange.body)
        request = IncomingRequest(waiter, Request("GET", target, (HOST,)), body)
        assert (request.path_with_query(), request.authority()) == (path, authority)
        assert request.scheme() == ("HTTP", None)
        assert request.consume() is body
        assert failure(request.consume) is None


def test_setters_take_what_can_be_sent(waiter: Waiter) -> None:
    response = OutgoingResponse(waiter, Fields())
    assert response.status_code() == 200
    response.set_status_code(404)
    for status in (0, 100, 101, 600):
        assert failure(response.set_status_code, status) is None
    assert response.status_code() == 404
    request = OutgoingRequest(waiter, Fields())
    request.set_method(("other", "BREW"))
    request.set_path_with_query("/a?b")
    request.set_scheme(("other", "ftp"))
    request.set_authority("[::1]:80")
    assert failure(request.set_method, ("other", "B REW")) is None
    assert failure(request.set_path_with_query, "/a b") is None
    assert failure(request.set_scheme, ("other", "1")) is None
    assert failure(request.set_authority, "a/b") is None
    assert (request.method(), request.path_with_query()) == (("other", "BREW"), "/a?b")
    assert (request.scheme(), request.authority()) == (("other", "ftp"), "[::1]:80")


def test_bodies_and_their_streams_are_given_once(waiter: Waiter) -> None:
    response = OutgoingResponse(waiter, Fields())
    body = response.body()
    assert failure(response.body) is None
    stream = body.write()
    assert failure(body.write) is None
    with pytest.raises(Trap, match="while its stream is open"):
        OutgoingBody.finish(body, None)
    stream.close()
    OutgoingBody.finish(body, None)


def test_errors_have_a_status_and_words() -> None:
    assert status_of(("internal-error", None)) == 500
    assert status_of(("HTTP-request-URI-too-long", None)) == 414
    assert status_of(("connection-refused", None)) == 502
    assert status_of(("connection-read-timeout", None)) == 504
    assert describe(("internal-error", "why")) == "internal-error: why"
    assert http_error_code(IoError("x", HttpError(("loop-detected", None)))) == ("loop-detected", None)
    assert http_error_code(IoError("x")) is None


# Exchanges.


@contextlib.contextmanager
def exchanges(
    data: bytes = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", *, last: bool = False
) -> Iterator[tuple[Exchange, socket.socket]]:
    """One whose request is `data`, and the client's socket."""
    ours, client = socket.socketpair(socket.AF_UNIX)
    with ours, client:
        ours.setblocking(False)
        client.settimeout(10)
        server = Server()
        server.receive(data)
        head = server.next_event()
        assert isinstance(head, Request)
        yield Exchange(server, Channel(ours), head, last=lambda: last), client


def received(client: socket.socket) -> bytes:
    return client.recv(1 << 20)


def respond(exchange: Exchange, waiter: Waiter, **headers: bytes) -> OutgoingResponse:
    response = OutgoingResponse(waiter, Fields.from_list([(name.replace("_", "-"), v) for name, v in headers.items()]))
    ResponseOutparam.set(ResponseOutparam(exchange), ("ok", response))
    return response


def test_a_response_that_is_known_before_it_is_sent_has_a_length(waiter: Waiter) -> None:
    with exchanges() as (exchange, client):
        response = OutgoingResponse(waiter, Fields())
        body = response.body()
        stream = body.write()
        assert stream.check_write() == BUFFER
        stream.write(b"all of it")
        stream.close()
        OutgoingBody.finish(body, None)
        exchange.respond(response)
        assert exchange.conclude(waiter)
        answer = received(client)
        assert b"content-length: 9\r\n" in answer
        assert answer.endswith(b"\r\n\r\nall of it")


def test_the_rest_of_a_request_may_come_after_its_answer(waiter: Waiter) -> None:
    head = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n%s\r\n"
    with exchanges(head % b"") as (exchange, client), ThreadPoolExecutor(1) as others:
        respond(exchange, waiter)
        concluded = others.submit(exchange.conclude, waiter)
        received(client)
        client.sendall(b"body")
        assert concluded.result(10)
    with exchanges(head % b"Expect: 100-continue\r\n") as (exchange, client):  # it never will
        respond(exchange, waiter)
        assert not exchange.conclude(waiter)


def test_a_response_without_a_body_is_complete(waiter: Waiter) -> None:
    with exchanges(last=True) as (exchange, client):
        respond(exchange, waiter, x_y=b"z")
        assert not exchange.conclude(waiter)
        answer = received(client)
        assert b"content-length: 0\r\n" in answer
        assert b"x-y: z\r\n" in answer
        assert b"connection: close\r\n" in answer.lower()
        assert exchange.complaint == ""


def test_a_head_goes_out_with_the_first_bytes_or_when_the_component_waits(waiter: Waiter) -> None:
    for waits in (False, True):
        with exchanges() as (exchange, client):
            client.setblocking(False)
            response = OutgoingResponse(waiter, Fields())
            stream = response.body().write()
            exchange.respond(response)
            stream.check_write()
            with pytest.raises(BlockingIOError):
                received(client)
            if waits:
                exchange.await_guest()
                assert received(client).endswith(b"chunked\r\n\r\n")
            stream.blocking_write_and_flush(b"first")
            assert received(client).endswith(b"5\r\nfirst\r\n" if waits else b"chunked\r\n\r\n5\r\nfirst\r\n")


@pytest.mark.parametrize("written", [b"1234", b"123456"])
def test_a_body_must_be_as_long_as_it_says(waiter: Waiter, written: bytes) -> None:
    with exchanges() as (exchange, _):
        response = OutgoingResponse(waiter, Fields.from_list([("content-length", b"5")]))
        body = response.body()
        exchange.respond(response)
        stream = body.write()
        stream.check_write()
        with contextlib.suppress(StreamFailed):
            stream.write(written)
        stream.close()
        assert failure(OutgoingBody.finish, body, None) == ("HTTP-response-body-size", len(written))
        assert not exchange.conclude(waiter)
        assert "not finished" in exchange.complaint


def test_a_length_that_is_none_is_the_components_fault(waiter: Waiter) -> None:
    with exchanges() as (exchange, _), pytest.raises(Trap, match="cannot be sent"):
        respond(exchange, waiter, content_length=b"many")


def test_a_client_that_does_not_read_holds_the_component(waiter: Waiter) -> None:
    with exchanges() as (exchange, client):
        response = OutgoingResponse(waiter, Fields())
        body = response.body()
        exchange.respond(response)
        stream = body.write()
        written = 0
        while size := stream.check_write():
            stream.write(bytes(size))
            written += size
        assert waiter.look((stream.source(),)) == []
        came = len(received(client))
        while came < written:
            stream.flush()
            came += len(received(client))
        assert stream.check_write() > 0


def test_a_client_that_has_gone_is_an_error_of_the_stream(waiter: Waiter) -> None:
    with exchanges() as (exchange, client):
        response = OutgoingResponse(waiter, Fields())
        body = response.body()
        exchange.respond(response)
        client.close()
        stream = body.write()
        with pytest.raises(StreamFailed) as caught:
            stream.blocking_write_and_flush(b"hello")
        error = caught.value.value[1]  # type: ignore[index]
        assert http_error_code(error) == ("connection-terminated", None)
        assert not exchange.conclude(waiter)
        assert exchange.complaint == ""


def test_an_error_for_a_client_that_has_gone(waiter: Waiter) -> None:
    with exchanges() as (exchange, client):
        client.close()
        ResponseOutparam.set(ResponseOutparam(exchange), ("err", ("loop-detected", None)))
        assert not exchange.conclude(waiter)
        assert exchange.complaint == "the component answered with the error loop-detected"


def test_trailers_come_when_the_body_has_been_read_or_not(waiter: Waiter) -> None:
    request = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    for read in (True, False):
        with exchanges(request) as (exchange, client):
            body = IncomingBody(waiter, exchange.body)
            if read:
                stream = body.stream()
                assert stream.blocking_read(3) == b"hel"
                assert stream.blocking_read(9) == b"lo"
                assert stream.read(9) == b""
                with pytest.raises(Trap, match="while its stream is open"):
                    IncomingBody.finish(body)
                stream.close()
            trailers = IncomingBody.finish(body)
            assert trailers.get() is None
            assert not trailers.subscribe().ready()
            client.sendall(b"0\r\nX-T: end\r\nConnection: x\r\n\r\n")
            trailers.subscribe().block()
            got: Any = trailers.get()
            assert (got[0], got[1][0], got[1][1].entries()) == ("ok", "ok", [("x-t", b"end")])
            assert trailers.get() == ("err", None)


def test_a_body_that_breaks_off_is_an_error(waiter: Waiter) -> None:
    with exchanges(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf") as (exchange, client):
        stream = IncomingBody(waiter, exchange.body).stream()
        assert stream.blocking_read(100) == b"half"
        client.close()
        with pytest.raises(StreamFailed):
            stream.blocking_read(100)


def test_the_end_of_a_body_is_the_end_of_its_stream(waiter: Waiter) -> None:
    with exchanges() as (exchange, _):
        stream = IncomingBody(waiter, exchange.body).stream()
        with pytest.raises(StreamClosed):
            stream.blocking_read(1)


def test_a_body_is_moved_in_pieces_and_kept_in_none() -> None:
    ours, other = socket.socketpair(socket.AF_UNIX)
    with ours, other:
        client, server = Client(), Server()
        sending, receiving = Channel(ours), Channel(other)
        ours.setblocking(False)
        other.setblocking(False)
        data = os.urandom(1 << 20)
        sending.queue(client.request(Request("POST", "/", (HOST, ("content-length", str(len(data)).encode())))))
        way, body, got, at = Outgoing(client, sending, len(data)), Incoming(server, receiving), b"", 0
        sending.push()
        server.receive(receiving.receive() or b"")
        assert isinstance(server.next_event(), Request)
        while (taken := body.take(16384)) is not None:
            got += taken
            if size := min(way.capacity(), len(data) - at):
                way.send(data[at : at + size])
                at += size
            if at == len(data) and not way.complete:
                way.end()
            assert sending.pending <= BUFFER
            way.flushed()
        assert got == data


def test_silence_ends_a_body() -> None:
    ours, other = socket.socketpair(socket.AF_UNIX)
    with ours, other:
        ours.setblocking(False)
        server = Server()
        server.receive(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n")
        server.next_event()
        body = Incoming(server, Channel(ours), idle=0)
        assert body.take(1) == b""
        with pytest.raises(HttpError, match="connection-read-timeout"):
            body.take(1)
        client = Client()
        channel = Channel(ours)
        channel.queue(client.request(Request("POST", "/", (HOST, ("transfer-encoding", b"chunked")))))
        way = Outgoing(client, channel, None, idle=0)
        while way.capacity():
            way.send(bytes(way.capacity()))
        way.interest()
        with pytest.raises(HttpError, match="connection-write-timeout"):
            way.capacity()


def test_a_wait_ends_when_the_client_has_gone(waiter: Waiter) -> None:
    with exchanges() as (exchange, client):
        waiter.serve(exchange)
        assert waiter.look((Timer(0), Timer(1 << 62))) == [0]
        client.close()
        with pytest.raises(Left):
            waiter.wait((Timer(1 << 62),))
        assert not exchange.is_wanted
        assert not exchange.conclude(waiter)
        assert exchange.complaint == ""
        others = ThreadPoolExecutor(1)  # who works for others goes on
        assert others.submit(waiter.wait, (Timer(time.monotonic_ns() + 1000),)).result() == [0]
        waiter.serve(None)
        waiter.stop()
        with pytest.raises(Stopped):
            waiter.wait((Timer(1 << 62),))


def test_client_end_reads_responses() -> None:
    client = Client()
    client.request(Request("GET", "/", (HOST,)))
    client.receive(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
    assert client.next_event() == Response(200, (("content-length", b"2"),))
    assert client.next_event() == b"hi"
    assert client.next_event() == End()


def test_prepared_sockets_do_not_block() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as made:
        assert prepared(made).getblocking() is False
