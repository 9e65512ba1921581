"""One request on a connection, and its response: what `response-outparam` gives, as HTTP/1.1.

Not the component. Invariant: the client gets one response, or sees that the one it got is not whole.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from cri_shim.wire.http1 import Headers, Request, Response, Server, UnsendableMessage, has_no_body
from handlers.wasmtime.wasip2.http_bodies import OutgoingBody
from handlers.wasmtime.wasip2.http_channel import Channel, Incoming, Outgoing
from handlers.wasmtime.wasip2.http_errors import Code, HttpError, describe, status_of
from handlers.wasmtime.wasip2.http_messages import OutgoingResponse
from handlers.wasmtime.wasip2.interface import Trap
from handlers.wasmtime.wasip2.waiter import Timer, Waiter

_UNREAD: Final = 256 << 10
"""Bytes of a request's body that nobody wanted which are taken all the same, to keep the connection."""
_PATIENCE: Final = 1_000_000_000
"""Nanoseconds in which they have to come: an answer is quicker than the second half of its request now and then."""
_INTERNAL_ERROR: Final = 500


class Exchange:
    """`http_messages.Answering` and `waiter.Client`. Belongs to the thread that has the request."""

    def __init__(self, peer: Server, channel: Channel, head: Request, *, last: Callable[[], bool]) -> None:
        """`last`: whether the connection is not to be used again."""
        self.head = head
        self.body = Incoming(peer, channel)
        self._peer = peer
        self._channel = channel
        self._last = last
        self._outgoing: Outgoing | None = None
        self._content: OutgoingBody | None = None
        self.complaint = ""
        """What the component's log should say of it."""
        self._due = True
        """The rest of the request's body comes, and makes the connection good for more."""
        self.is_wanted = True
        """False: the client has gone."""

    def respond(self, response: OutgoingResponse) -> None:
        """`Answering`."""
        try:
            self._begin(response)
            if self._outgoing is not None and not response.has_no_body:
                self._content = response.content
                self._content.go(self._outgoing)
        except HttpError:
            pass  # the client has gone, or has been told another length: the stream of the body says so
        except UnsendableMessage as error:
            msg = f"wasi:http/types: the response cannot be sent: {error}"
            raise Trap(msg) from None

    def _begin(self, response: OutgoingResponse) -> None:
        size = 0 if response.has_no_body else response.content.known_size
        headers = self._completed(response, size)
        head = Response(response.status, headers)
        bodiless = has_no_body(head, self.head.method)
        self._due = not self._peer.waits_for_continue
        self._channel.queue(self._peer.respond(head, to=self.head.method))
        self._outgoing = Outgoing(self._peer, self._channel, None if bodiless else _declared(headers))
        if response.has_no_body:
            self._outgoing.end()

    def _completed(self, response: OutgoingResponse, size: int | None) -> Headers:
        """The headers of the component, and what a server adds."""
        headers = response.fields.entries_now
        names = {name for name, _ in headers}
        bodiless = has_no_body(Response(response.status, ()), self.head.method)
        if size is not None and not bodiless and "content-length" not in names:
            headers += (("content-length", str(size).encode()),)
        if "date" not in names:
            headers += (("date", _date(int(time.time()))),)
        if self._last():
            headers += (("connection", b"close"),)
        return headers

    def await_guest(self) -> int:
        """`Client`: a head that waits for the first bytes of its body goes out without them."""
        with contextlib.suppress(HttpError):  # the next to use the channel finds it too
            self._channel.push()
        return self._channel.wire.fileno()

    def refuse(self, code: Code) -> None:
        """`Answering`."""
        self.complaint = f"the component answered with the error {describe(code)}"
        with contextlib.suppress(HttpError):  # the client has gone
            self._refuse(status_of(code))

    def _refuse(self, status: int) -> None:
        self._due = False
        self._channel.queue(self._peer.refuse(status, "the component cannot answer", to=self.head.method))
        self._outgoing = Outgoing(self._peer, self._channel, None)
        self._outgoing.complete = True
        self._outgoing.flushed()

    def returned(self) -> None:
        """The component has: a body that it still holds is at its end, as in the engine's own implementation."""
        content, outgoing = self._content, self._outgoing
        if outgoing is not None and not outgoing.complete and content is not None and not content.dropped:
            with contextlib.suppress(HttpError):  # `conclude` finds it incomplete
                outgoing.end()

    def conclude(self, waiter: Waiter) -> bool:
        """The component has returned, or has ended: whether the connection is good for the next request."""
        if not self.is_wanted:
            return False
        try:
            if self._outgoing is None:
                self.complaint = self.complaint or "the component has not answered"
                self._refuse(_INTERNAL_ERROR)
            outgoing = self._outgoing
            if outgoing is None or not outgoing.complete:
                if outgoing is not None and not outgoing.lost:
                    self.complaint = "the component has not finished its response"
                return False
            while not outgoing.flushed():
                waiter.wait((outgoing,))
            return self._discard(waiter) and self._peer.begin_again()
        except (HttpError, UnsendableMessage):  # the client has gone, which is no matter of the component's
            return False

    def _discard(self, waiter: Waiter) -> bool:
        """What nobody wanted of the request's body: whether that was all of it. HttpError."""
        left, over = _UNREAD, Timer(time.monotonic_ns() + _PATIENCE)
        while left > 0:
            data = self.body.take(left)
            if data is None:
                return True
            left -= len(data)
            if not data and (not self._due or 1 in waiter.wait((self.body, over))):
                return False
        return False


def _declared(headers: Headers) -> int | None:
    """What a Content-Length says; the wire has refused one that is no number."""
    return next((int(value) for name, value in headers if name == "content-length"), None)


@lru_cache(maxsize=1)
def _date(seconds: int) -> bytes:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(seconds)).encode()
