"""`incoming-body`, `outgoing-body`, their streams, and `future-trailers` of `wasi:http/types`.

Not how bytes are framed and moved (`http_channel`). Invariant: a message whose body was dropped before it was finished
is never ended, so that whoever receives it knows that it is not whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from handlers.wasmtime.wasip2.http_channel import BUFFER, Incoming, Outgoing
from handlers.wasmtime.wasip2.http_errors import HttpError
from handlers.wasmtime.wasip2.http_fields import Entries, Fields, visible
from handlers.wasmtime.wasip2.interface import Failure, Function, Trap, methods
from handlers.wasmtime.wasip2.poll import Pollable
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.streams import InputStream, OutputStream, StreamClosed, StreamFailed
from handlers.wasmtime.wasip2.waiter import NEVER, READY, Interest, Source, Waiter

_DISCARD: Final = 1 << 20
"""Bytes of a body that nobody reads which one look takes away."""


def _stay() -> None:
    """Of a server, whose connection is not the component's."""


class IncomingBody(Resource, resource=True):
    """`incoming-body`. `leave` is called when nobody wants more of it."""

    def __init__(self, waiter: Waiter, body: Incoming, leave: Callable[[], None] = _stay) -> None:
        self._waiter = waiter
        self._body = body
        self._leave = leave
        self._stream: _BodyInput | None = None

    def stream(self) -> InputStream:
        """`incoming-body.stream`: once."""
        if self._stream is not None:
            raise Failure
        self._body.want()
        self._stream = _BodyInput(self._waiter, self._body)
        return self._stream

    @staticmethod
    def finish(this: IncomingBody) -> FutureTrailers:
        """`incoming-body.finish`."""
        if this._stream is not None and this._stream.is_open:
            msg = "wasi:http/types: incoming-body.finish was called while its stream is open"
            raise Trap(msg)
        this._body.want()
        return FutureTrailers(this._waiter, this._body, this._leave)

    def close(self) -> None:
        """`Resource`."""
        self._leave()


class _BodyInput(InputStream):
    def __init__(self, waiter: Waiter, body: Incoming) -> None:
        super().__init__(waiter)
        self._body = body
        self.is_open = True

    def receive(self, size: int) -> bytes:
        """`InputStream`."""
        try:
            taken = self._body.take(size)
        except HttpError as error:
            raise StreamFailed(str(error), error) from None
        if taken is None:
            raise StreamClosed
        return taken

    def source(self) -> Source:
        """`InputStream`."""
        return self._body

    def close(self) -> None:
        """`Resource`."""
        self.is_open = False


class FutureTrailers(Resource, resource=True):
    """`future-trailers`: what is left of the body is discarded to get there."""

    def __init__(self, waiter: Waiter, body: Incoming, leave: Callable[[], None] = _stay) -> None:
        self._waiter = waiter
        self._body = body
        self._leave = leave
        self._given = False

    def subscribe(self) -> Pollable:
        """`future-trailers.subscribe`."""
        return Pollable(self._waiter, _Discarded(self._body))

    def get(self) -> object:
        """`future-trailers.get`: option<result<result<option<trailers>, error-code>>>."""
        try:
            if not self._body.skip(_DISCARD):
                return None
        except HttpError as error:
            return self._once(("err", error.code))
        trailers = self._body.trailers
        return self._once(("ok", visible(trailers) if trailers else None))

    def _once(self, value: object) -> object:
        if self._given:
            return ("err", None)
        self._given = True
        return ("ok", value)

    def close(self) -> None:
        """`Resource`."""
        self._leave()


class _Discarded(Source):
    def __init__(self, body: Incoming) -> None:
        self._body = body

    def interest(self) -> Interest:
        """`Source`."""
        self.settle()
        return self._body.interest()

    def settle(self) -> bool:
        """`Source`."""
        try:
            return self._body.skip(_DISCARD)
        except HttpError:
            return True


class OutgoingBody(Resource, Source, resource=True):
    """`outgoing-body`. Before its message is sent it takes BUFFER bytes; `starting` is what it waits for until then."""

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter
        self._before = bytearray()
        self._way: Outgoing | None = None
        self._trailers: Entries | None = None
        self._stream: _BodyOutput | None = None
        self._flushing = False
        self._error: HttpError | None = None
        self.dropped = False
        self.starting: Source | None = None
        self.abandon: Callable[[], None] = _stay

    @property
    def known_size(self) -> int | None:
        """What its size is if that is known before it is sent."""
        return len(self._before) if self._trailers is not None and not self._trailers else None

    def go(self, way: Outgoing) -> None:
        """Its message is on its way. HttpError."""
        self._way = way
        way.send(bytes(self._before))
        self._before.clear()
        if self._trailers is not None:
            way.end(self._trailers)

    def write(self) -> OutputStream:
        """`outgoing-body.write`: once."""
        if self._stream is not None:
            raise Failure
        self._stream = _BodyOutput(self._waiter, self)
        return self._stream

    @staticmethod
    def finish(this: OutgoingBody, trailers: Fields | None) -> None:
        """`outgoing-body.finish`."""
        if this._stream is not None and this._stream.is_open:
            msg = "wasi:http/types: outgoing-body.finish was called while its stream is open"
            raise Trap(msg)
        this._trailers = trailers.entries_now if trailers is not None else ()
        if this._way is not None:
            try:
                this._way.end(this._trailers)
            except HttpError as error:
                raise Failure(error.code) from None

    def close(self) -> None:
        """`Resource`: it was dropped, and not finished."""
        self.dropped = True
        self.abandon()

    def capacity(self) -> int:
        """See `OutputStream`. HttpError."""
        self._go_on()
        return self._way.capacity() if self._way is not None else BUFFER - len(self._before)

    def take(self, data: bytes) -> None:
        """Likewise."""
        self._flushing = False
        if self._way is not None:
            self._way.send(data)
        else:
            self._before += data

    def flushed(self) -> bool:
        """Likewise. What nobody has begun to send has been flushed as far as it can be."""
        self._flushing = True
        self._go_on()
        return self._way.flushed() if self._way is not None else self.starting is None

    def interest(self) -> Interest:
        """`Source`."""
        if self.settle():
            return READY
        way = self._way or self.starting
        return way.interest() if way is not None else NEVER

    def settle(self) -> bool:
        """`Source`."""
        with contextlib.suppress(HttpError):  # the call that was waited for finds it too
            self._go_on()
        if self._way is not None or self._error is not None:
            return self._way is None or self._way.settle()
        return len(self._before) < BUFFER and not (self._flushing and self.starting is not None)

    def fail(self, error: HttpError) -> None:
        """Its message will not be sent, or no further."""
        self._error = error

    def _go_on(self) -> None:
        if self._way is None and self.starting is not None:
            self.starting.settle()
        if self._error is not None:
            raise self._error


class _BodyOutput(OutputStream):
    def __init__(self, waiter: Waiter, body: OutgoingBody) -> None:
        super().__init__(waiter)
        self._body = body
        self.is_open = True

    def capacity(self) -> int:
        """`OutputStream`."""
        try:
            return self._body.capacity()
        except HttpError as error:
            raise StreamFailed(str(error), error) from None

    def send(self, data: bytes) -> None:
        """`OutputStream`."""
        try:
            self._body.take(data)
        except HttpError as error:
            raise StreamFailed(str(error), error) from None

    def flushed(self) -> bool:
        """`OutputStream`."""
        try:
            return self._body.flushed()
        except HttpError as error:
            raise StreamFailed(str(error), error) from None

    def source(self) -> Source:
        """`OutputStream`."""
        return self._body

    def close(self) -> None:
        """`Resource`."""
        self.is_open = False


RESOURCES: Final[dict[str, type[Resource]]] = {
    "incoming-body": IncomingBody,
    "outgoing-body": OutgoingBody,
    "future-trailers": FutureTrailers,
}
FUNCTIONS: Final[dict[str, Function]] = {
    **methods("incoming-body", IncomingBody, "stream"),
    "[static]incoming-body.finish": IncomingBody.finish,
    **methods("future-trailers", FutureTrailers, "subscribe", "get"),
    **methods("outgoing-body", OutgoingBody, "write"),
    "[static]outgoing-body.finish": OutgoingBody.finish,
}
