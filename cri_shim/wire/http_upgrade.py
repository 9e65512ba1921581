"""The one HTTP/1.1 request of a streaming connection, by h11: read it, refuse it, or switch to another protocol.

Not the choice of the protocol (`wire.negotiation`). Invariant: a head has at most MAX_HEAD bytes and there is no body;
whatever came behind the head is kept for the protocol that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import h11

MAX_HEAD: Final = 16 << 10
"""Bytes of request line and headers."""
_SWITCHING: Final = HTTPStatus.SWITCHING_PROTOCOLS.phrase.encode()

Headers = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Request:
    """What the client asks for. Names of headers are in lower case."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    def words(self, name: str) -> list[str]:
        """The values of a header, in order; it may stand more than once, with commas in each."""
        values = ",".join(value for key, value in self.headers if key == name)
        return [word.strip() for word in values.split(",")] if values else []


@dataclass(frozen=True, slots=True)
class Refusal:
    """An HTTP error and its words."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class BadRequest(Exception):
    """What came is no request that could be served."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.body.decode())
        self.refusal = refusal


class HttpUpgrade:
    """The server's end, until something else follows or the connection is closed."""

    def __init__(self) -> None:
        self._core = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._request: h11.Request | None = None

    def receive_data(self, data: bytes) -> Request | None:
        """The request, once it is there in full. Raises BadRequest."""
        try:
            self._core.receive_data(data)
            while True:
                event = self._core.next_event()
                if isinstance(event, h11.Request):
                    self._request = event
                elif isinstance(event, h11.EndOfMessage) and self._request is not None:
                    return self._complete(self._request)
                elif isinstance(event, h11.Data):
                    raise BadRequest(Refusal(HTTPStatus.BAD_REQUEST, b"the request has a body\n"))
                else:
                    return None
        except h11.RemoteProtocolError as error:
            text = f"no valid HTTP request: {error}\n".encode()
            raise BadRequest(Refusal(error.error_status_hint, text)) from error

    @property
    def trailing(self) -> bytes:
        """What came behind the head."""
        return bytes(self._core.trailing_data[0])

    def switch(self, headers: Headers) -> bytes:
        """The answer 101: from here on the connection speaks what `headers` says."""
        return self._core.send(h11.InformationalResponse(status_code=101, reason=_SWITCHING, headers=headers)) or b""

    def refuse(self, refusal: Refusal) -> bytes:
        """The answer to a request, or to what is none. The connection closes with it."""
        headers = [
            ("content-type", "application/json" if refusal.body.startswith(b"{") else "text/plain; charset=utf-8"),
            ("content-length", str(len(refusal.body))),
            ("connection", "close"),
            *refusal.headers,
        ]
        response = h11.Response(
            status_code=refusal.status, reason=HTTPStatus(refusal.status).phrase.encode(), headers=headers
        )
        parts = [self._core.send(event) for event in (response, h11.Data(data=refusal.body), h11.EndOfMessage())]
        return b"".join(part for part in parts if part)

    def _complete(self, request: h11.Request) -> Request:
        if request.http_version < b"1.1":
            raise BadRequest(Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, b"the request is not HTTP/1.1\n"))
        return Request(
            method=request.method.decode("ascii"),
            target=request.target.decode("ascii"),
            headers=tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in request.headers),
        )
