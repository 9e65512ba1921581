"""Requests, responses and the options of `wasi:http/types`, as resources.

Not their bodies (`http_bodies`) and not how they travel (`http_server`, `http_outgoing`). Invariant: what a setter took
can be sent; a component that gives something else gets an error from the setter.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from cri_shim.wire.http1 import Request
from handlers.wasmtime.wasip2.http_bodies import IncomingBody, OutgoingBody
from handlers.wasmtime.wasip2.http_errors import Code
from handlers.wasmtime.wasip2.http_fields import Fields, visible
from handlers.wasmtime.wasip2.interface import Failure, Function, methods
from handlers.wasmtime.wasip2.poll import Pollable
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.waiter import Source, Waiter

Case = tuple[str, str | None]
"""A variant's value: `method`, `scheme`."""
_METHODS: Final = frozenset({"get", "head", "post", "put", "delete", "connect", "options", "trace", "patch"})
_TOKEN: Final = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_AUTHORITY: Final = re.compile(r"[-._~%!$&'()*+,;=:@\[\]0-9A-Za-z]+")
_TARGET: Final = re.compile(r"[\x21-\x7e]*")
_SCHEME: Final = re.compile(r"[A-Za-z][-+.0-9A-Za-z]*")
_ABSOLUTE: Final = re.compile(r"([A-Za-z][-+.0-9A-Za-z]*)://([^/?#]*)([^#]*)")


def method_case(method: str) -> Case:
    """Of the word in a request line."""
    return (method.lower(), None) if method.isupper() and method.lower() in _METHODS else ("other", method)


def method_word(case: Case) -> str:
    """The reverse."""
    name, other = case
    return name.upper() if other is None else other


class IncomingRequest(Resource, resource=True):
    """`incoming-request`."""

    def __init__(self, waiter: Waiter, head: Request, body: IncomingBody) -> None:
        self._waiter = waiter
        self._head = head
        self._headers = visible(head.headers)
        self._body: IncomingBody | None = body
        self._absolute = _ABSOLUTE.fullmatch(head.target)

    def method(self) -> Case:
        """`incoming-request.method`."""
        return method_case(self._head.method)

    def path_with_query(self) -> str | None:
        """`incoming-request.path-with-query`."""
        if self._absolute is None:
            return self._head.target
        path = self._absolute[3]
        return path if path.startswith("/") else f"/{path}"

    def scheme(self) -> Case | None:
        """`incoming-request.scheme`: what we serve."""
        return ("HTTP", None)

    def authority(self) -> str | None:
        """`incoming-request.authority`: of the target, else of the header Host."""
        if self._absolute is not None:
            return self._absolute[2]
        return next((value.decode("latin-1") for name, value in self._head.headers if name == "host"), None)

    def headers(self) -> Fields:
        """`incoming-request.headers`."""
        return Fields(self._headers.entries_now, frozen=True)

    def consume(self) -> IncomingBody:
        """`incoming-request.consume`: once."""
        body, self._body = self._body, None
        if body is None:
            raise Failure
        return body


class OutgoingResponse(Resource, resource=True):
    """`outgoing-response`."""

    def __init__(self, waiter: Waiter, headers: Fields) -> None:
        self.status = 200
        self.fields = headers.freeze()
        self.content = OutgoingBody(waiter)
        self._body_given = False

    @property
    def has_no_body(self) -> bool:
        """Nobody asked for it, so that nobody finishes it."""
        return not self._body_given

    def status_code(self) -> int:
        """`outgoing-response.status-code`."""
        return self.status

    def set_status_code(self, status: int) -> None:
        """`outgoing-response.set-status-code`: of a final response."""
        if not 200 <= status <= 599:
            raise Failure
        self.status = status

    def headers(self) -> Fields:
        """`outgoing-response.headers`."""
        return Fields(self.fields.entries_now, frozen=True)

    def body(self) -> OutgoingBody:
        """`outgoing-response.body`: once."""
        if self._body_given:
            raise Failure
        self._body_given = True
        return self.content


class OutgoingRequest(Resource, resource=True):
    """`outgoing-request`."""

    def __init__(self, waiter: Waiter, headers: Fields) -> None:
        self.fields = headers.freeze()
        self.content = OutgoingBody(waiter)
        self._body_given = False
        self._method: Case = ("get", None)
        self._scheme: Case | None = None
        self._authority: str | None = None
        self._path: str | None = None

    @property
    def has_no_body(self) -> bool:
        """Nobody asked for it, so that nobody finishes it."""
        return not self._body_given

    def body(self) -> OutgoingBody:
        """`outgoing-request.body`: once."""
        if self._body_given:
            raise Failure
        self._body_given = True
        return self.content

    def method(self) -> Case:
        """`outgoing-request.method`."""
        return self._method

    def set_method(self, method: Case) -> None:
        """`outgoing-request.set-method`."""
        if method[1] is not None and _TOKEN.fullmatch(method[1]) is None:
            raise Failure
        self._method = method

    def path_with_query(self) -> str | None:
        """`outgoing-request.path-with-query`."""
        return self._path

    def set_path_with_query(self, path: str | None) -> None:
        """`outgoing-request.set-path-with-query`."""
        if path is not None and _TARGET.fullmatch(path) is None:
            raise Failure
        self._path = path

    def scheme(self) -> Case | None:
        """`outgoing-request.scheme`."""
        return self._scheme

    def set_scheme(self, scheme: Case | None) -> None:
        """`outgoing-request.set-scheme`."""
        if scheme is not None and scheme[1] is not None and _SCHEME.fullmatch(scheme[1]) is None:
            raise Failure
        self._scheme = scheme

    def authority(self) -> str | None:
        """`outgoing-request.authority`."""
        return self._authority

    def set_authority(self, authority: str | None) -> None:
        """`outgoing-request.set-authority`."""
        if authority is not None and _AUTHORITY.fullmatch(authority) is None:
            raise Failure
        self._authority = authority

    def headers(self) -> Fields:
        """`outgoing-request.headers`."""
        return Fields(self.fields.entries_now, frozen=True)


class RequestOptions(Resource, resource=True):
    """`request-options`: times in nanoseconds."""

    def __init__(self) -> None:
        self.connect: int | None = None
        self.first_byte: int | None = None
        self.between_bytes: int | None = None

    def connect_timeout(self) -> int | None:
        """`request-options.connect-timeout`."""
        return self.connect

    def set_connect_timeout(self, duration: int | None) -> None:
        """`request-options.set-connect-timeout`."""
        self.connect = duration

    def first_byte_timeout(self) -> int | None:
        """`request-options.first-byte-timeout`."""
        return self.first_byte

    def set_first_byte_timeout(self, duration: int | None) -> None:
        """`request-options.set-first-byte-timeout`."""
        self.first_byte = duration

    def between_bytes_timeout(self) -> int | None:
        """`request-options.between-bytes-timeout`."""
        return self.between_bytes

    def set_between_bytes_timeout(self, duration: int | None) -> None:
        """`request-options.set-between-bytes-timeout`."""
        self.between_bytes = duration


class IncomingResponse(Resource, resource=True):
    """`incoming-response`."""

    def __init__(self, status: int, headers: Fields, body: IncomingBody) -> None:
        self._status = status
        self._headers = headers
        self._body: IncomingBody | None = body

    def status(self) -> int:
        """`incoming-response.status`."""
        return self._status

    def headers(self) -> Fields:
        """`incoming-response.headers`."""
        return Fields(self._headers.entries_now, frozen=True)

    def consume(self) -> IncomingBody:
        """`incoming-response.consume`: once."""
        body, self._body = self._body, None
        if body is None:
            raise Failure
        return body

    def close(self) -> None:
        """`Resource`."""
        if self._body is not None:
            self._body.close()


class Pending(Source):
    """A request on its way."""

    def outcome(self) -> IncomingResponse | Code | None:
        """None = nothing has come yet."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Nobody waits for it any more."""


class FutureIncomingResponse(Resource, resource=True):
    """`future-incoming-response`."""

    def __init__(self, waiter: Waiter, pending: Pending) -> None:
        self._waiter = waiter
        self._pending = pending
        self._given = False

    def subscribe(self) -> Pollable:
        """`future-incoming-response.subscribe`."""
        return Pollable(self._waiter, self._pending)

    def get(self) -> object:
        """`future-incoming-response.get`: option<result<result<incoming-response, error-code>>>."""
        if self._given:
            return ("err", None)
        outcome = self._pending.outcome()
        if outcome is None:
            return None
        self._given = True
        return ("ok", ("ok" if isinstance(outcome, IncomingResponse) else "err", outcome))

    def close(self) -> None:
        """`Resource`."""
        if not self._given:
            self._pending.abandon()


class Answering(Protocol):
    """Who waits for the response to a request."""

    def respond(self, response: OutgoingResponse) -> None:
        """With this."""
        ...

    def refuse(self, code: Code) -> None:
        """There is none, but an error."""
        ...


class ResponseOutparam(Resource, resource=True):
    """`response-outparam`."""

    def __init__(self, exchange: Answering) -> None:
        self._exchange = exchange

    @staticmethod
    def set(param: ResponseOutparam, response: tuple[str, OutgoingResponse | Code]) -> None:
        """`response-outparam.set`."""
        given = response[1]
        if isinstance(given, OutgoingResponse):
            param._exchange.respond(given)
        else:
            param._exchange.refuse(given)


RESOURCES: Final[dict[str, type[Resource]]] = {
    "incoming-request": IncomingRequest,
    "outgoing-request": OutgoingRequest,
    "request-options": RequestOptions,
    "response-outparam": ResponseOutparam,
    "incoming-response": IncomingResponse,
    "future-incoming-response": FutureIncomingResponse,
    "outgoing-response": OutgoingResponse,
}


def functions(waiter: Waiter) -> dict[str, Function]:
    """Of all these."""
    return {
        **methods(
            "incoming-request",
            IncomingRequest,
            *("method", "path-with-query", "scheme", "authority", "headers", "consume"),
        ),
        "[constructor]outgoing-request": lambda headers: OutgoingRequest(waiter, headers),
        **methods(
            "outgoing-request",
            OutgoingRequest,
            *("body", "method", "set-method", "path-with-query", "set-path-with-query", "scheme", "set-scheme"),
            *("authority", "set-authority", "headers"),
        ),
        "[constructor]request-options": RequestOptions,
        **methods(
            "request-options",
            RequestOptions,
            *("connect-timeout", "set-connect-timeout", "first-byte-timeout", "set-first-byte-timeout"),
            *("between-bytes-timeout", "set-between-bytes-timeout"),
        ),
        "[static]response-outparam.set": ResponseOutparam.set,
        **methods("incoming-response", IncomingResponse, "status", "headers", "consume"),
        **methods("future-incoming-response", FutureIncomingResponse, "subscribe", "get"),
        "[constructor]outgoing-response": lambda headers: OutgoingResponse(waiter, headers),
        **methods("outgoing-response", OutgoingResponse, "status-code", "set-status-code", "headers", "body"),
    }
