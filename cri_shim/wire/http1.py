"""HTTP/1.1 by h11: the messages of one connection, as a server or as a client, from bytes to events and back.

Not the sockets, and not what is said. Invariant: a head is at most MAX_HEAD bytes, a message that cannot be sent whole
is never ended, and nothing of a body is kept here beyond what came with the last bytes. Source: RFC 9110, 9112.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import h11

MAX_HEAD: Final = 64 << 10
"""Bytes of a start line and its headers."""

Headers = tuple[tuple[str, bytes], ...]
"""Names in lower case."""
_BODILESS: Final = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head. `target` as in the request line."""

    method: str
    target: str
    headers: Headers


@dataclass(frozen=True, slots=True)
class Response:
    """A response's head."""

    status: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class End:
    """The message is complete."""

    trailers: Headers = ()


@dataclass(frozen=True, slots=True)
class Closed:
    """The peer sends nothing more, and was not in the middle of a message."""


Event = Request | Response | bytes | End | Closed


class BrokenMessage(Exception):
    """What came is no HTTP, or ended before its time. `status` answers it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class UnsendableMessage(Exception):
    """What was to be sent is no HTTP, or not what its head has announced."""


class _Peer:
    """What both ends have in common."""

    def __init__(self, role: type[h11.SERVER | h11.CLIENT]) -> None:
        self._core = h11.Connection(role, max_incomplete_event_size=MAX_HEAD)
        self._in_chunks = False

    def receive(self, data: bytes) -> None:
        """Bytes of the peer; none = it has ended its side. BrokenMessage."""
        try:
            self._core.receive_data(data)
        except h11.RemoteProtocolError as error:
            raise _broken(error) from None

    def next_event(self) -> Event | None:
        """What has come; None = not yet. BrokenMessage."""
        try:
            event = self._core.next_event()
        except h11.RemoteProtocolError as error:
            raise _broken(error) from None
        if isinstance(event, h11.Data):
            return bytes(event.data)
        if isinstance(event, h11.Request):
            return Request(event.method.decode(), event.target.decode(), _headers(event.headers))
        if isinstance(event, h11.Response):
            return Response(event.status_code, _headers(event.headers))
        if isinstance(event, h11.EndOfMessage):
            return End(_headers(event.headers))
        if isinstance(event, h11.InformationalResponse):
            return self.next_event()
        return Closed() if isinstance(event, h11.ConnectionClosed) else None

    def _send(self, kind: Callable[..., h11.Event], **fields: object) -> bytes:
        try:
            return self._core.send(kind(**fields)) or b""
        except h11.LocalProtocolError as error:
            raise UnsendableMessage(str(error)) from None

    def end(self, trailers: Headers = ()) -> bytes:
        """The end of our message. Trailers go with a body in chunks only: with others they are left out."""
        return self._send(h11.EndOfMessage, headers=_sent(trailers if self._in_chunks else ()))


class Server(_Peer):
    """The server's end: one request after the other, each answered before the next."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._bodiless = False

    @property
    def has_begun(self) -> bool:
        """A part of a head has come."""
        return bool(self._core.trailing_data[0])

    @property
    def waits_for_continue(self) -> bool:
        """The client sends the body when it is told to (`Expect: 100-continue`)."""
        return self._core.they_are_waiting_for_100_continue

    def go_on(self) -> bytes:
        """Tell it."""
        return self._send(h11.InformationalResponse, status_code=100, headers=[], reason=b"Continue")

    def respond(self, response: Response, *, to: str) -> bytes:
        """A response's head, to a request with the method `to`. With no Content-Length the body goes in chunks."""
        self._bodiless = has_no_body(response, to)
        sized = self._bodiless or any(name == "content-length" for name, _ in response.headers)
        self._in_chunks = not sized and self._core.their_http_version == b"1.1"
        headers = _sent(response.headers)
        return self._send(h11.Response, status_code=response.status, headers=headers, reason=_phrase(response.status))

    def data(self, content: bytes) -> bytes:
        """A part of the body, which is left out where there is none (HEAD, 204, 304)."""
        return b"" if self._bodiless or not content else self._send(h11.Data, data=content)

    def refuse(self, status: int, text: str, *, to: str = "GET") -> bytes:
        """A whole response with a line of text; the connection is not for another one."""
        content = f"{text}\n".encode()
        headers = (
            ("content-type", b"text/plain; charset=utf-8"),
            ("content-length", str(len(content)).encode()),
            ("connection", b"close"),
        )
        head = self.respond(Response(status, headers), to=to)
        return head + self.data(content) + self._send(h11.EndOfMessage)

    def begin_again(self) -> bool:
        """Both messages are complete and the connection stays: on to the next request. False = close it."""
        if self._core.our_state is not h11.DONE or self._core.their_state is not h11.DONE:
            return False
        self._core.start_next_cycle()
        return True


class Client(_Peer):
    """The client's end, for one request."""

    def __init__(self) -> None:
        super().__init__(h11.CLIENT)

    def request(self, request: Request) -> bytes:
        """A request's head. With neither Content-Length nor Transfer-Encoding there is no body."""
        self._in_chunks = any(name == "transfer-encoding" for name, _ in request.headers)
        headers = _sent(request.headers)
        return self._send(h11.Request, method=request.method, target=request.target, headers=headers)

    def data(self, content: bytes) -> bytes:
        """A part of the body."""
        return self._send(h11.Data, data=content) if content else b""


def has_no_body(response: Response, to: str) -> bool:
    """Whether a response to this method has none, whatever its headers say (RFC 9112, 6.3)."""
    return to == "HEAD" or response.status in _BODILESS


def _headers(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return tuple((bytes(name).decode("ascii"), bytes(value)) for name, value in headers)


def _sent(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode("ascii"), value.strip(b" \t")) for name, value in headers]


def _phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""


def _broken(error: h11.RemoteProtocolError) -> BrokenMessage:
    return BrokenMessage(error.error_status_hint, str(error))
