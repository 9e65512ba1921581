"""`wasi:http/outgoing-handler` against servers in threads: what goes out, what comes back, and every way to fail."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cri_shim.wire import http1
from handlers.wasmtime.wasip2 import http_tls
from handlers.wasmtime.wasip2.http_bodies import IncomingBody, OutgoingBody
from handlers.wasmtime.wasip2.http_fields import Fields
from handlers.wasmtime.wasip2.http_messages import (
    FutureIncomingResponse,
    IncomingResponse,
    OutgoingRequest,
    RequestOptions,
)
from handlers.wasmtime.wasip2.http_outgoing import Sending
from handlers.wasmtime.wasip2.http_tls import Authorities
from handlers.wasmtime.wasip2.interface import Failure
from handlers.wasmtime.wasip2.streams import StreamClosed, StreamFailed
from handlers.wasmtime.wasip2.waiter import FdSource, Waiter

Code = tuple[str, object]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@pytest.fixture
def waiter() -> Iterator[Waiter]:
    with closing(Waiter(contextlib.nullcontext)) as made:
        yield made


class Server:
    """Answers each connection with what `script` says of its head, or does what it does."""

    def __init__(self, script: bytes | Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> None:
        self.heads: list[bytes] = []
        self._last = ("", 0)
        self._script = script
        self._context = context
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, address = self._sock.accept()
            if address == self._last:
                connection.close()
                return
            with contextlib.suppress(OSError), connection:
                connection.settimeout(10)
                self._serve(connection if self._context is None else self._context.wrap_socket(connection, True))

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head and (part := connection.recv(1)):
                head += part
            self.heads.append(head)
            if isinstance(self._script, bytes):
                connection.sendall(self._script)
            else:
                self._script(connection)

    def close(self) -> None:
        """When all connections until now have been served."""
        with socket.socket() as last:
            last.bind(("127.0.0.1", 0))
            self._last = last.getsockname()
            last.connect(("127.0.0.1", self.port))
            self._thread.join()
        self._sock.close()


def request(
    waiter: Waiter, authority: str, path: str = "/", *, scheme: str = "HTTP", **headers: bytes
) -> OutgoingRequest:
    made = OutgoingRequest(
        waiter, Fields.from_list([(name.replace("_", "-"), value) for name, value in headers.items()])
    )
    made.set_scheme((scheme, None))
    made.set_authority(authority)
    made.set_path_with_query(path)
    return made


def send(waiter: Waiter, asked: OutgoingRequest, **options: int) -> FutureIncomingResponse:
    wanted = RequestOptions()
    for name, value in options.items():
        getattr(wanted, f"set_{name}_timeout")(value)
    return FutureIncomingResponse(waiter, Sending(waiter, asked, wanted, Authorities()))


def outcome(future: FutureIncomingResponse) -> tuple[str, Any]:
    future.subscribe().block()
    got: Any = future.get()
    assert got[0] == "ok"
    assert future.get() == ("err", None)
    return got[1]  # type: ignore[no-any-return]


def response(future: FutureIncomingResponse) -> IncomingResponse:
    kind, value = outcome(future)
    assert (kind, type(value)) == ("ok", IncomingResponse)
    assert isinstance(value, IncomingResponse)
    return value


def error(future: FutureIncomingResponse) -> Code:
    kind, value = outcome(future)
    assert kind == "err"
    return value  # type: ignore[no-any-return]


def content(got: IncomingResponse) -> bytes:
    body = got.consume()
    with closing(body), closing(body.stream()) as stream:
        parts = []
        with contextlib.suppress(StreamClosed):
            while True:
                parts.append(stream.blocking_read(1000))
        return b"".join(parts)


def test_a_request_and_its_response(waiter: Waiter) -> None:
    head = b"HTTP/1.1 404 No\r\nX-Y: z\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = b"HTTP/1.1 103 Early Hints\r\n\r\n" + head + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    with closing(Server(answer)) as server:
        got = response(send(waiter, request(waiter, f"user@localhost:{server.port}", "/a?b", x_a=b"1")))
        assert (got.status(), got.headers().entries()) == (404, [("x-y", b"z")])
        assert content(got) == b"abcde"
    line, *headers = server.heads[0].strip().split(b"\r\n")
    assert line == b"GET /a?b HTTP/1.1"
    assert sorted(header.lower() for header in headers) == [
        b"connection: close",
        f"host: localhost:{server.port}".encode(),
        b"x-a: 1",
    ]


@pytest.mark.parametrize(
    ("method", "body", "framing"),
    [
        ("get", None, b""),
        ("get", b"", b""),
        ("post", None, b"content-length: 0"),
        ("post", b"hello", b"content-length: 5"),
    ],
)
def test_a_body_that_is_known_has_a_length(waiter: Waiter, method: str, body: bytes | None, framing: bytes) -> None:
    with closing(Server(OK)) as server:
        asked = request(waiter, f"127.0.0.1:{server.port}")
        asked.set_method((method, None))
        if body is not None:
            going = asked.body()
            stream = going.write()
            stream.check_write()
            stream.write(body)
            stream.close()
            OutgoingBody.finish(going, None)
        assert content(response(send(waiter, asked))) == b"hi"
    lengths = [line for line in server.heads[0].lower().split(b"\r\n") if line.startswith((b"content-l", b"transfer"))]
    assert lengths == ([framing] if framing else [])


def test_a_long_body_goes_out_while_it_is_written(waiter: Waiter) -> None:
    """With nobody looking at the response: room in the body is all that is waited for."""
    data = bytes(range(256)) * 2000
    heard: list[http1.Event] = []

    def take(connection: socket.socket) -> None:
        peer = http1.Server()
        peer.receive(server.heads[0])
        while not isinstance(event := peer.next_event(), http1.End):
            if event is None:
                peer.receive(connection.recv(65536))
            else:
                heard.append(event)
        heard.append(event)
        connection.sendall(OK)

    with closing(Server(take)) as server:
        asked = request(waiter, f"127.0.0.1:{server.port}")
        asked.set_method(("put", None))
        body = asked.body()
        future = send(waiter, asked)
        stream = body.write()
        for at in range(0, len(data), 4096):
            stream.blocking_write_and_flush(data[at : at + 4096])
        stream.close()
        OutgoingBody.finish(body, Fields.from_list([("x-end", b"1")]))
        assert content(response(future)) == b"hi"
    assert b"".join(part for part in heard if isinstance(part, bytes)) == data
    assert heard[-1] == http1.End((("x-end", b"1"),))


def test_a_body_that_is_not_finished_is_not_sent_as_whole(waiter: Waiter) -> None:
    def hear(connection: socket.socket) -> None:
        heard = b""
        while part := connection.recv(65536):
            heard += part
        server.heads.append(heard)

    with closing(Server(hear)) as server:
        asked = request(waiter, f"127.0.0.1:{server.port}")
        asked.set_method(("post", None))
        body = asked.body()
        future = send(waiter, asked)
        stream = body.write()
        stream.blocking_write_and_flush(b"half")
        stream.close()
        body.close()
        assert error(future) == ("connection-terminated", None)
    assert server.heads[1] == b"4\r\nhalf\r\n"


def test_a_request_that_says_too_little_is_refused_at_once(waiter: Waiter) -> None:
    for asked, code in (
        (OutgoingRequest(waiter, Fields()), "HTTP-request-URI-invalid"),
        (request(waiter, "host:99999"), "HTTP-request-URI-invalid"),
        (request(waiter, "a:b:c"), "HTTP-request-URI-invalid"),
        (request(waiter, "host", scheme="other"), "HTTP-protocol-error"),
    ):
        with pytest.raises(Failure) as caught:
            send(waiter, asked)
        assert caught.value.value == (code, None)
    tunnel = request(waiter, "host")
    tunnel.set_method(("connect", None))
    with pytest.raises(Failure):
        send(waiter, tunnel)


def test_who_cannot_be_reached(waiter: Waiter) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert error(send(waiter, request(waiter, f"127.0.0.1:{unused.getsockname()[1]}"))) == (
            "connection-refused",
            None,
        )
    assert error(send(waiter, request(waiter, "no_such_host.invalid")))[0].startswith("DNS-")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"", "HTTP-protocol-error"),
        (b"what is this?\r\n\r\n", "HTTP-protocol-error"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "HTTP-protocol-error"),
    ],
)
def test_what_is_no_response(waiter: Waiter, answer: bytes, code: str) -> None:
    with closing(Server(answer)) as server:
        assert error(send(waiter, request(waiter, f"127.0.0.1:{server.port}"))) == (code, None)


def test_a_response_that_breaks_off_is_an_error_of_its_stream(waiter: Waiter) -> None:
    with closing(Server(OK[:-1])) as server:
        got = response(send(waiter, request(waiter, f"127.0.0.1:{server.port}")))
        with pytest.raises(StreamFailed):
            content(got)


def test_times_are_limited_as_the_options_say(waiter: Waiter) -> None:
    over = threading.Event()

    def wait(connection: socket.socket) -> None:
        over.wait(10)

    def stall(connection: socket.socket) -> None:
        connection.sendall(OK[:-1])
        over.wait(10)

    with closing(Server(wait)) as server:
        asked = request(waiter, f"127.0.0.1:{server.port}")
        assert error(send(waiter, asked, first_byte=20_000_000)) == ("HTTP-response-timeout", None)
        over.set()
    over.clear()
    with closing(Server(stall)) as server:
        got = response(send(waiter, request(waiter, f"127.0.0.1:{server.port}"), between_bytes=20_000_000))
        with pytest.raises(StreamFailed):
            content(got)
        over.set()


def test_nothing_stays_open(waiter: Waiter) -> None:
    """Whatever the component lets go of, and when."""
    gone: list[bool] = []

    def hear(connection: socket.socket) -> None:
        if b"/silent" not in server.heads[-1]:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhi")
        gone.append(connection.recv(1) == b"")

    with closing(Server(hear)) as server:
        authority = f"127.0.0.1:{server.port}"
        response(send(waiter, request(waiter, authority))).close()
        response(send(waiter, request(waiter, authority))).consume().close()
        IncomingBody.finish(response(send(waiter, request(waiter, authority))).consume()).close()
        future = send(waiter, request(waiter, authority, "/silent"))
        while len(server.heads) < 4:
            future.subscribe().ready()
        future.close()
    assert gone == [True] * 4


# TLS.


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    """A certificate for localhost that has signed itself, with its key."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def tls_server(identity: Path, script: bytes) -> Server:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity / "cert.pem", identity / "key.pem")
    return Server(script, context)


def test_https(waiter: Waiter, identity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_tls, "_BUNDLES", ("/nowhere", str(identity / "cert.pem")))
    with closing(tls_server(identity, OK)) as server:
        got = response(send(waiter, request(waiter, f"localhost:{server.port}", scheme="HTTPS")))
        assert content(got) == b"hi"
        # The name counts, not only who has signed it.
        by_address = send(waiter, request(waiter, f"127.0.0.1:{server.port}", scheme="HTTPS"))
        assert error(by_address) == ("TLS-certificate-error", None)


def test_who_cannot_be_trusted(waiter: Waiter, identity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bundles in ((), http_tls._BUNDLES):
        monkeypatch.setattr(http_tls, "_BUNDLES", bundles)
        with closing(tls_server(identity, OK)) as server:
            future = send(waiter, request(waiter, f"localhost:{server.port}", scheme="HTTPS"))
            assert error(future) == ("TLS-certificate-error", None)
    with socket.create_server(("127.0.0.1", 0)) as plain:
        future = send(waiter, request(waiter, f"localhost:{plain.getsockname()[1]}", scheme="HTTPS"))
        while not waiter.look((FdSource(plain.fileno(), select.POLLIN),)):
            future.subscribe().ready()
        with plain.accept()[0] as connection:
            connection.sendall(OK)
            assert error(future) == ("TLS-protocol-error", None)
