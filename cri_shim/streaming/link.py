"""One TCP or TLS connection: bytes in both directions, no faster than the other side takes them.

Not a protocol. Invariant: at most HIGH_WATER bytes and one piece of each writer wait to be sent, and nothing is read
while reading is paused.
"""

# mypy: disable-error-code="explicit-override"
from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Awaitable, Callable
from typing import Final, cast

from cri_shim.streaming.hangup import HangupWatch

READ_BYTES: Final = 64 << 10
"""Read at once: what is parsed without a pause of the loop."""
HIGH_WATER: Final = 256 << 10
LOW_WATER: Final = 64 << 10
MAX_ANSWERS: Final = 64 << 10
"""Bytes of answers (pongs, resets) to a client that does not read them."""
LINGER_SECONDS: Final = 10.0
"""How long a connection on which all is said and read may stay open."""
_LOOK_SECONDS: Final = 1.0
_INT: Final = struct.Struct("i")

_buffer: Final = memoryview(bytearray(READ_BYTES))
"""Of all connections: what is read is parsed before the loop goes on."""


class Link(asyncio.BufferedProtocol):
    """A client's connection. `receive` is called with what comes."""

    _transport: asyncio.Transport
    """There once `connection_made` has been called; nobody has the link before."""

    def __init__(self, hangups: HangupWatch) -> None:
        self.receive: Callable[[bytes], None] = _ignore
        self.on_end: Callable[[], None] = _nothing
        """Called when nothing will come any more."""
        self._hangups = hangups
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        """Done when the client has left, or has broken a rule: nobody takes what is written."""
        self._closed = asyncio.Event()
        self.active = 0.0
        """When something came or left on a stream, by the loop's clock. Pings and their like do not count."""
        self._full = False
        self._writers: list[asyncio.Future[None]] = []
        self._answered = 0
        self._paused = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It begins. Nothing is read before somebody wants to."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER, low=LOW_WATER)
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.pause_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes are put."""
        del sizehint
        return _buffer

    def buffer_updated(self, nbytes: int) -> None:
        """They are there."""
        self.receive(bytes(_buffer[:nbytes]))

    def eof_received(self) -> bool:
        """Nobody half-closes TCP here: the client has left. The transport closes itself."""
        self.leave()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended, whoever ended it."""
        del exc
        self._unwatch()
        self._closed.set()
        self.leave()
        self.on_end()

    def pause_writing(self) -> None:
        """Too much waits to be sent."""
        self._full = True

    def resume_writing(self) -> None:
        """There is room again."""
        self._full = False
        self._answered = 0
        self._wake()

    # What the conversation calls.

    def write(self, data: bytes) -> None:
        """Send; after it `drain` has to be awaited."""
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def touch(self) -> None:
        """Something has come or left on a stream."""
        self.active = self._loop.time()

    def answer(self, data: bytes) -> None:
        """Send what nobody waits for. A client that asks and never reads is cut off."""
        self.write(data)
        if self._full:
            self._answered += len(data)
            if self._answered > MAX_ANSWERS:
                self.abort()

    @property
    def is_closed(self) -> bool:
        """Whether nothing will come any more."""
        return self._closed.is_set()

    @property
    def is_full(self) -> bool:
        """Whether a writer has to wait."""
        return self._full

    async def drain(self) -> None:
        """Return when there is room; at once when the client has gone."""
        while self._full and not self.gone.done():
            waiter = self._loop.create_future()
            self._writers.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._writers:
                    self._writers.remove(waiter)

    def pause_reading(self) -> None:
        """Let TCP slow the client down. That it leaves is noticed all the same."""
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()
            self._hangups.add(self._socket.fileno(), self.leave)

    def resume_reading(self) -> None:
        """The opposite."""
        if self._paused:
            self._unwatch()
            self._transport.resume_reading()

    async def linger(self, patience: float) -> None:
        """All is said: wait for the client to read it and to close, then close.

        Closing at once would cost a client what it has not read, if it has sent something meanwhile. One that stops
        reading has `patience` seconds, one that has read all and does not close LINGER_SECONDS.
        """
        self.resume_reading()
        before, since = self._unsent(), self._loop.time()
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._closed.wait()
            now = self._unsent()
            if now != before:
                before, since = now, self._loop.time()
            elif self._loop.time() - since >= (patience if now and not self.gone.done() else LINGER_SECONDS):
                break
        self.abort()

    def close(self) -> None:
        """Send what waits, then close. Nothing is read any more."""
        self._unwatch()
        self._transport.close()
        self.leave()

    def close_write(self) -> None:
        """Nothing follows; for HTTP, where it is how a response may end."""
        if not self._transport.is_closing() and self._transport.can_write_eof():
            self._transport.write_eof()

    def abort(self) -> None:
        """Close at once; what has not been sent is lost."""
        self._unwatch()
        self._transport.abort()
        self.leave()

    def leave(self) -> None:
        """From now on the client counts as gone."""
        if not self.gone.done():
            self.gone.set_result(None)
        self._wake()

    @property
    def _socket(self) -> socket.socket:
        return cast("socket.socket", self._transport.get_extra_info("socket"))

    def _unsent(self) -> int:
        """Bytes that the client has not taken, here and in the kernel (tcp(7), SIOCOUTQ)."""
        if self._transport.is_closing():
            return 0
        waiting = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(_INT.size))
        return self._transport.get_write_buffer_size() + int(_INT.unpack(waiting)[0])

    def _unwatch(self) -> None:
        if self._paused:
            self._paused = False
            self._hangups.remove(self._socket.fileno())

    def _wake(self) -> None:
        for waiter in self._writers:
            if not waiter.done():
                waiter.set_result(None)
        self._writers.clear()


async def wait_first(*events: Awaitable[object], timeout: float | None = None) -> None:
    """Return when one of them is done, or time is up. Coroutines are ended then; futures and tasks go on."""
    futures = [asyncio.ensure_future(event) for event in events]
    try:
        await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for event, future in zip(events, futures, strict=True):
            if event is not future:
                future.cancel()


def _ignore(data: bytes) -> None:
    del data


def _nothing() -> None:
    pass
