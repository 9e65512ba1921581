"""One HTTP connection's bytes and bodies: a non-blocking socket, what waits to be sent, what has come.

Not the resources that a component sees. Invariant: what is kept is bounded: BUFFER bytes and a chunk that the peer has
not taken yet, and what one `recv` brought. A peer that neither takes nor gives a byte for IDLE is given up.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import Final, Protocol

from cri_shim.wire.http1 import BrokenMessage, Client, End, Headers, Server
from handlers.wasmtime.wasip2.http_errors import HttpError, code_of
from handlers.wasmtime.wasip2.waiter import READY, Interest, Source

BUFFER: Final = 64 << 10
_RECEIVE: Final = 64 << 10
IDLE: Final = 60_000_000_000
"""Nanoseconds."""


class Wire(Protocol):
    """A connected socket, plain or TLS, that does not block: BlockingIOError."""

    def recv(self, size: int, /) -> bytes:
        """b"" at the end."""
        ...

    def send(self, data: memoryview, /) -> int:
        """How much was taken."""
        ...

    def fileno(self) -> int:
        """Its descriptor."""
        ...

    def close(self) -> None:
        """Twice is success."""
        ...


class Channel:
    """The socket, and what is on its way out."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.sent = 0
        """Bytes, in all."""
        self._out = bytearray()

    @property
    def pending(self) -> int:
        """Bytes that have not been taken."""
        return len(self._out)

    def receive(self) -> bytes | None:
        """What is there; b"" at the end, None = nothing now. HttpError."""
        try:
            return self.wire.recv(_RECEIVE)
        except BlockingIOError:
            return None
        except OSError as error:
            raise HttpError(code_of(error)) from None

    def queue(self, data: bytes) -> None:
        """To be sent by `push`."""
        self._out += data

    def push(self) -> bool:
        """Send what is taken: whether it was all. HttpError."""
        while self._out:
            try:
                with memoryview(self._out) as view:
                    taken = self.wire.send(view)
            except BlockingIOError:
                return False
            except OSError as error:
                raise HttpError(code_of(error)) from None
            self.sent += taken
            del self._out[:taken]
        return True


class Incoming(Source):
    """The body of the message that comes. Ready when `take` does not come back with nothing."""

    def __init__(self, peer: Server | Client, channel: Channel, idle: int = IDLE) -> None:
        self._peer = peer
        self._channel = channel
        self._idle = idle
        self._rest = b""
        self._deadline: int | None = None
        self._error: HttpError | None = None
        self.trailers: Headers | None = None
        """What came behind it; None = it is not at its end."""

    def want(self) -> None:
        """Somebody is going to read it: a client that waits to be told so is told."""
        if isinstance(self._peer, Server) and self._peer.waits_for_continue:
            self._channel.queue(self._peer.go_on())
            with contextlib.suppress(HttpError):  # the next to use the channel finds it too
                self._channel.push()

    def take(self, size: int) -> bytes | None:
        """At most so many bytes; b"" = nothing now, None = it is at its end. HttpError, from then on."""
        if not self.settle():
            return b""
        if self._error is not None:
            raise self._error
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken or None

    def skip(self, most: int) -> bool:
        """Discard what is there, so much at most: whether it is at its end now. HttpError."""
        while most > 0:
            taken = self.take(most)
            if not taken:
                return taken is None
            most -= len(taken)
        return False

    def interest(self) -> Interest:
        """`Source`."""
        if self.settle():
            return READY
        return Interest(((self._channel.wire.fileno(), select.POLLIN),), self._deadline)

    def settle(self) -> bool:
        """`Source`: take from the socket until there is something to tell, which is bytes, the end, or an error."""
        try:
            while not (self._rest or self.trailers is not None or self._error is not None):
                if not self._advance():
                    return False
        except HttpError as error:
            self._error = error
        except BrokenMessage as error:
            self._error = HttpError(code_of(error))
        return True

    def _advance(self) -> bool:
        event = self._peer.next_event()
        if event is None:
            return self._receive()
        if isinstance(event, bytes):
            self._rest, self._deadline = event, None
        elif isinstance(event, End):
            self.trailers = event.trailers
        else:
            raise HttpError(("HTTP-protocol-error", None))
        return True

    def _receive(self) -> bool:
        data = self._channel.receive()
        if data is None:
            now = time.monotonic_ns()
            if self._deadline is None:
                self._deadline = now + self._idle
            elif now >= self._deadline:
                raise HttpError(("connection-read-timeout", None))
            return False
        self._peer.receive(data)
        return True


class Outgoing(Source):
    """The body of the message that goes; its head has been queued. Ready when there is room, or all has been sent.

    `declared`: the Content-Length that the head has.
    """

    def __init__(self, peer: Server | Client, channel: Channel, declared: int | None, idle: int = IDLE) -> None:
        self._peer = peer
        self._channel = channel
        self._declared = declared
        self._wrong_size = "HTTP-request-body-size" if isinstance(peer, Client) else "HTTP-response-body-size"
        self._idle = idle
        self._sent = 0
        self._flushing = False
        self._deadline: int | None = None
        self._error: HttpError | None = None
        self.complete = False
        self.lost = False
        """The peer has gone, or does not take it."""

    def capacity(self) -> int:
        """Bytes that `send` takes now. HttpError, from then on."""
        if self._sent or self._error is not None:  # else only the head waits, which goes out with what follows it
            self._move()
        return max(0, BUFFER - self._channel.pending)

    def send(self, data: bytes) -> None:
        """Take it. HttpError when the head has announced less."""
        self._sent += len(data)
        if self._declared is not None and self._sent > self._declared:
            self._error = HttpError((self._wrong_size, self._sent))
            raise self._error
        self._channel.queue(self._peer.data(data))
        self._flushing = False

    def flushed(self) -> bool:
        """Whether all has been sent; called again when it is ready. HttpError."""
        self._flushing = True
        self._move()
        return not self._channel.pending

    def end(self, trailers: Headers = ()) -> None:
        """The message is complete. HttpError when the head has announced more."""
        if self._error is not None:
            raise self._error
        if self._declared is not None and self._sent != self._declared:
            raise HttpError((self._wrong_size, self._sent))
        self._channel.queue(self._peer.end(trailers))
        self.complete = True
        self.flushed()

    def interest(self) -> Interest:
        """`Source`."""
        if self.settle():
            return READY
        if self._deadline is None:
            self._deadline = time.monotonic_ns() + self._idle
        return Interest(((self._channel.wire.fileno(), select.POLLOUT),), self._deadline)

    def settle(self) -> bool:
        """`Source`."""
        try:
            self._move()
        except HttpError:
            return True
        return self._channel.pending <= (0 if self._flushing else BUFFER // 2)

    def _move(self) -> None:
        if self._error is not None:
            raise self._error
        before = self._channel.pending
        try:
            self._channel.push()
        except HttpError as error:
            self._error, self.lost = error, True
            raise
        if self._channel.pending < before:
            self._deadline = None
        elif self._deadline is not None and time.monotonic_ns() >= self._deadline:
            self._error, self.lost = HttpError(("connection-write-timeout", None)), True
            raise self._error


def prepared(sock: socket.socket) -> socket.socket:
    """A connected socket as a `Wire`: what is written goes out at once."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
