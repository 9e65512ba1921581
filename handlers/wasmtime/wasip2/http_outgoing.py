"""`wasi:http/outgoing-handler`: requests of components, as HTTP/1.1 over a connection each.

Not the messages (`http_messages`). A request has no thread: it goes on whenever its component looks at it, or waits for
its response or for room in its body. Invariant: its socket is closed when the component has let go of the response.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import select
import socket
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Final

from cri_shim.kernel import libc
from cri_shim.wire.http1 import BrokenMessage, Client, Request, Response, UnsendableMessage
from handlers.wasmtime.wasip2.http_bodies import IncomingBody
from handlers.wasmtime.wasip2.http_channel import Channel, Incoming, Outgoing, Wire, prepared
from handlers.wasmtime.wasip2.http_errors import Code, HttpError, code_of
from handlers.wasmtime.wasip2.http_fields import visible
from handlers.wasmtime.wasip2.http_messages import (
    FutureIncomingResponse,
    IncomingResponse,
    OutgoingRequest,
    Pending,
    RequestOptions,
    method_word,
)
from handlers.wasmtime.wasip2.http_tls import Authorities, TlsWire
from handlers.wasmtime.wasip2.interface import Failure, Interface
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.sockets_lookup import look_up
from handlers.wasmtime.wasip2.sockets_network import Address
from handlers.wasmtime.wasip2.waiter import READY, Interest, Waiter
from handlers.wasmtime.wasip2.world import World

_PORTS: Final = {"HTTP": 80, "HTTPS": 443}
_AUTHORITY: Final = re.compile(r"(?:[^@]*@)?(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
_PATIENCE: Final = 600_000_000_000
"""Nanoseconds, where the component's options say nothing."""
_BODILESS: Final = frozenset({"GET", "HEAD", "DELETE", "OPTIONS", "TRACE"})
_LOOKUP_CODES: Final[dict[object, Code]] = {
    "name-unresolvable": ("DNS-error", {"rcode": "NXDOMAIN", "info-code": None}),
    "temporary-resolver-failure": ("DNS-timeout", None),
    "invalid-argument": ("HTTP-request-URI-invalid", None),
}
_OTHER_LOOKUP: Final[Code] = ("DNS-error", {"rcode": None, "info-code": None})


class _Target:
    """Whom a request is for. Failure with the error code when it does not say."""

    def __init__(self, request: OutgoingRequest) -> None:
        scheme = (request.scheme() or ("HTTPS", None))[0]
        found = _AUTHORITY.fullmatch(request.authority() or "")
        if scheme not in _PORTS:
            raise Failure(("HTTP-protocol-error", None))
        if found is None:
            raise Failure(("HTTP-request-URI-invalid", None))
        self.tls = scheme == "HTTPS"
        self.host = found[1].strip("[]")
        self.port = int(found[2] or _PORTS[scheme])
        self.authority = (request.authority() or "").rpartition("@")[2]
        path = request.path_with_query() or "/"
        self.path = path if path.startswith(("/", "*")) else f"/{path}"
        if not 0 < self.port < 1 << 16:
            raise Failure(("HTTP-request-URI-invalid", None))


class Sending(Pending):
    """One request."""

    def __init__(
        self, waiter: Waiter, request: OutgoingRequest, options: RequestOptions | None, authorities: Authorities
    ) -> None:
        """Failure with the error code when it cannot be sent."""
        self._target = _Target(request)
        if method_word(request.method()) == "CONNECT":
            raise Failure(("HTTP-request-method-invalid", None))
        self._waiter = waiter
        self._request = request
        self._options = options or RequestOptions()
        self._authorities = authorities
        self._wire: Wire | None = None
        self._waits = READY
        self._deadline = 0
        self._outcome: IncomingResponse | Code | None = None
        self._steps = self._run()
        request.content.starting = self
        request.content.abandon = self.abandon

    def outcome(self) -> IncomingResponse | Code | None:
        """`Pending`."""
        self.settle()
        return self._outcome

    def abandon(self) -> None:
        """`Pending`. It is too late when there is a response: that has the connection."""
        if self._outcome is None:
            self._end(("HTTP-request-denied", None) if self._wire is None else ("connection-terminated", None))

    def interest(self) -> Interest:
        """`Source`."""
        return READY if self.settle() else self._waits

    def settle(self) -> bool:
        """`Source`: go on as far as it goes without waiting."""
        if self._outcome is None:
            try:
                self._waits = next(self._steps)
            except StopIteration as done:
                self._finish(done.value)
            except HttpError as error:
                self._end(error.code)
            except (BrokenMessage, OSError) as error:
                self._end(code_of(error))
        return self._outcome is not None

    def _end(self, code: Code) -> None:
        self._finish(code)
        self._request.content.fail(HttpError(code))
        self._steps.close()
        if self._wire is not None:
            self._wire.close()

    def _finish(self, outcome: IncomingResponse | Code) -> None:
        self._outcome = outcome
        self._request.content.starting = None

    def _run(self) -> Generator[Interest, None, IncomingResponse]:
        """Its course, from one wait to the next; what is yielded is asked for once more before it goes on."""
        options = self._options
        self._within(options.connect)
        addresses = yield from self._addresses()
        sock = yield from self._connected(addresses)
        wire = (yield from self._secured(sock)) if self._target.tls else sock
        client, channel = Client(), Channel(wire)
        self._begin(client, channel)
        self._within(options.first_byte)
        while (event := client.next_event()) is None:
            channel.push()
            data = channel.receive()
            if data is None:
                events = select.POLLIN | (select.POLLOUT if channel.pending else 0)
                yield self._wait(wire.fileno(), events, ("HTTP-response-timeout", None))
            else:
                client.receive(data)
        if not isinstance(event, Response):
            raise HttpError(("HTTP-response-incomplete", None))
        idle = options.between_bytes if options.between_bytes is not None else _PATIENCE
        body = IncomingBody(self._waiter, Incoming(client, channel, idle), wire.close)
        return IncomingResponse(event.status, visible(event.headers), body)

    def _within(self, duration: int | None) -> None:
        """How long it may wait from now on."""
        self._deadline = time.monotonic_ns() + (duration if duration is not None else _PATIENCE)

    def _wait(self, fd: int, events: int, late: Code) -> Interest:
        if time.monotonic_ns() >= self._deadline:
            raise HttpError(late)
        return Interest(((fd, events),), self._deadline)

    def _addresses(self) -> Generator[Interest, None, list[Address]]:
        try:
            lookup = look_up(self._waiter, self._target.host)
            try:
                while (found := lookup.found()) is None:
                    if time.monotonic_ns() >= self._deadline:
                        raise HttpError(("DNS-timeout", None))
                    yield Interest(lookup.interest().fds, self._deadline)
            finally:
                lookup.close()
        except Failure as failure:
            raise HttpError(_LOOKUP_CODES.get(failure.value, _OTHER_LOOKUP)) from None
        if not found:
            raise HttpError(("destination-not-found", None))
        return found

    def _connected(self, addresses: Sequence[Address]) -> Generator[Interest, None, socket.socket]:
        """To the first address that answers. OSError of the last one."""
        error = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        for address in addresses:
            sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            self._wire = sock
            number = sock.connect_ex(replace(address, port=self._target.port).native)
            if number == errno.EINPROGRESS:
                yield self._wait(sock.fileno(), select.POLLOUT, ("connection-timeout", None))
                while not _is_ready(sock):
                    yield self._wait(sock.fileno(), select.POLLOUT, ("connection-timeout", None))
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number == 0:
                return prepared(sock)
            sock.close()
            error = OSError(number, os.strerror(number))
        raise error

    def _secured(self, sock: socket.socket) -> Generator[Interest, None, TlsWire]:
        self._wire = wire = self._authorities.wrap(sock, self._target.host)
        while events := wire.shake_hands():
            yield self._wait(wire.fileno(), events, ("connection-timeout", None))
        return wire

    def _begin(self, client: Client, channel: Channel) -> None:
        """Queue the head, and let the body go."""
        request, target = self._request, self._target
        size = 0 if request.has_no_body else request.content.known_size
        method = method_word(request.method())
        headers = (("host", target.authority.encode()), ("connection", b"close"), *request.fields.entries_now)
        declared = next((value for name, value in headers if name == "content-length"), None)
        if declared is None and size is None:
            headers += (("transfer-encoding", b"chunked"),)
        elif declared is None and (size or method not in _BODILESS):
            headers += (("content-length", str(size).encode()),)
        try:
            channel.queue(client.request(Request(method, target.path, headers)))
        except UnsendableMessage:
            raise HttpError(("HTTP-protocol-error", None)) from None
        way = Outgoing(client, channel, int(declared) if declared is not None else None)
        if request.has_no_body:
            way.end()
        else:
            request.content.go(way)


def _is_ready(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    return bool(poller.poll(0))


@functools.cache
def _authorities() -> Authorities:
    """Of the process, which has one guest."""
    return Authorities()


def interface(world: World) -> Interface:
    """`wasi:http/outgoing-handler`."""
    libc.load_resolver()
    authorities = _authorities()

    def handle(request: OutgoingRequest, options: RequestOptions | None) -> FutureIncomingResponse:
        return FutureIncomingResponse(world.waiter, Sending(world.waiter, request, options, authorities))

    resources: dict[str, type[Resource]] = {
        "outgoing-request": OutgoingRequest,
        "request-options": RequestOptions,
        "future-incoming-response": FutureIncomingResponse,
    }
    return Interface(resources, {"handle": handle})
