"""The streams of one connection: what comes for each of them waits in an inlet, what leaves goes through an outlet.

Not what the streams mean. Invariant: at most MAX_HELD bytes and one read wait to be taken; then the client is read no
further until somebody has taken some.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from cri_shim.model.streams import PIECE_BYTES
from cri_shim.streaming.link import Link
from cri_shim.wire.mux import (
    DataReceived,
    Event,
    Mux,
    PeerLeaves,
    PeerLeft,
    ProtocolFailed,
    StreamEnded,
    StreamOpened,
    StreamReset,
)

MAX_HELD: Final = 256 << 10
"""Of all streams of a connection together: they share one TCP connection, and SPDY as it is spoken has no windows."""
REASSURE_SECONDS: Final = 15.0
"""Between two signs of life to a client that is not read."""
MAX_IN_A_ROW: Final = 128 << 10
"""Bytes that are written to one stream before others get their turn."""
_PIECE_COST: Final = 128
"""Bytes that holding a piece takes beside its content: many small ones are no way around the limit."""


class NobodyReads(ConnectionError):
    """The client has gone, or takes no more on this stream."""


class Inlet:
    """A `Source`: one stream from the client."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._pieces: deque[bytes] = deque()
        self._ended = False
        self._is_taken = True
        self._reader: asyncio.Future[None] | None = None
        self.was_reset = False
        """The client has dropped the stream: what was sent on it may be incomplete."""

    async def read(self) -> bytes:
        """The next piece; empty at the end."""
        if not await self._has_some():
            return b""
        piece = self._pieces.popleft()
        self._budget.give_back(len(piece) + _PIECE_COST)
        return piece

    async def read_all(self) -> bytes:
        """All that is there, once there is something; empty at the end."""
        if not await self._has_some():
            return b""
        pieces = b"".join(self._pieces)
        self._drop()
        return pieces

    def put(self, piece: bytes) -> None:
        """A piece has come."""
        if self._is_taken and not self._ended:
            self._pieces.append(piece)
            self._budget.take(len(piece) + _PIECE_COST)
            self._wake()

    def end(self) -> None:
        """No more comes; what is there can be read."""
        self._ended = True
        self._wake()

    def discard(self) -> None:
        """Nobody reads this stream any more: what comes is dropped, so that it holds up no other."""
        self._is_taken = False
        self._drop()
        self.end()

    async def _has_some(self) -> bool:
        while not self._pieces and not self._ended:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return bool(self._pieces)

    def _drop(self) -> None:
        self._budget.give_back(sum(len(piece) + _PIECE_COST for piece in self._pieces))
        self._pieces.clear()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Outlet:
    """A `Sink`: one stream to the client."""

    def __init__(self, link: Link, mux: Mux, stream: int) -> None:
        self._link = link
        self._mux = mux
        self._stream = stream
        self._closed = False
        self._in_a_row = 0
        self.was_reset = False

    async def write(self, data: bytes) -> None:
        """Send; returns when there is room for the next piece. ConnectionError when nobody takes it."""
        if self._closed:
            msg = "the stream has been closed"
            raise BrokenPipeError(msg)
        for start in range(0, len(data), PIECE_BYTES):
            piece = data if len(data) <= PIECE_BYTES else data[start : start + PIECE_BYTES]
            self._check()
            self._link.write(self._mux.send_data(self._stream, piece))
            self._link.touch()
            self._in_a_row += len(piece)
            if self._link.is_full:
                self._in_a_row = 0
                await self._link.drain()
            elif self._in_a_row >= MAX_IN_A_ROW:
                self._in_a_row = 0
                await asyncio.sleep(0)  # a source that is never empty and a client that is never full would go on alone
        self._check()

    async def close(self) -> None:
        """No more follows."""
        self.end()

    def end(self) -> None:
        """The same for those who cannot wait."""
        if not self._closed:
            self._closed = True
            self._link.write(self._mux.send_end(self._stream))

    def _check(self) -> None:
        if self._link.gone.done():
            msg = "the client has closed the connection"
            raise NobodyReads(msg)
        if self.was_reset:
            msg = "the client has reset the stream"
            raise NobodyReads(msg)


class Budget:
    """Counts what waits to be taken, and pauses the connection when it is too much."""

    def __init__(self, link: Link, mux: Mux) -> None:
        self._link = link
        self._mux = mux
        self._held = 0
        self._reassuring: asyncio.TimerHandle | None = None
        """There while reading is paused."""

    def take(self, size: int) -> None:
        """More waits."""
        self._held += size
        if self._held > MAX_HELD and self._reassuring is None:
            self._link.pause_reading()
            self._reassure_later()

    def give_back(self, size: int) -> None:
        """Less waits."""
        self._held -= size
        if self._held <= MAX_HELD // 2 and self._reassuring is not None:
            self._reassuring.cancel()
            self._reassuring = None
            self._link.resume_reading()

    def _reassure_later(self) -> None:
        self._reassuring = asyncio.get_running_loop().call_later(REASSURE_SECONDS, self._reassure)

    def _reassure(self) -> None:
        if not self._link.is_closed:
            self._link.answer(self._mux.still_here())
            self._reassure_later()


class Channels:
    """All streams of one connection."""

    def __init__(self, link: Link, mux: Mux, trailing: bytes) -> None:
        """`trailing` is what has been read of the connection already."""
        self._link = link
        self._mux = mux
        self._trailing = trailing
        self._budget = Budget(link, mux)
        self._inlets: dict[int, Inlet] = {}
        self._outlets: dict[int, Outlet] = {}
        self.on_open: Callable[[StreamOpened], None] = lambda opened: self.refuse(opened.stream)
        """What to do with a stream that the client opens: `accept` or `refuse` it."""
        self.on_close: Callable[[int], None] = lambda stream: None
        """The client has reset a stream."""
        self._is_left = self._is_closed = False
        self.failure = ""
        """What rule the client has broken."""

    def start(self) -> None:
        """Take over the connection. Before it, `take` or `on_open` has to say what becomes of the streams."""
        self._link.on_end = self._end
        self._link.receive = self._receive
        self._link.resume_reading()
        trailing, self._trailing = self._trailing, b""
        self._receive(trailing)
        if self._link.is_closed:
            self._end()

    def accept(self, stream: int) -> tuple[Inlet, Outlet]:
        """Both ends of a stream that the client has opened."""
        self._link.answer(self._mux.accept(stream))
        return self.take(stream)

    def take(self, stream: int) -> tuple[Inlet, Outlet]:
        """Both ends of a stream that is there."""
        inlet, outlet = Inlet(self._budget), Outlet(self._link, self._mux, stream)
        self._inlets[stream], self._outlets[stream] = inlet, outlet
        return inlet, outlet

    def refuse(self, stream: int) -> None:
        """Reset a stream, or drop it."""
        self._link.answer(self._mux.send_reset(stream))
        self.forget(stream)

    def forget(self, stream: int) -> None:
        """Neither side needs the stream any more; what still comes is dropped."""
        inlet = self._inlets.pop(stream, None)
        if inlet is not None:
            inlet.discard()
        self._outlets.pop(stream, None)
        self._close_if_done()

    def discard_input(self) -> None:
        """Nothing that comes matters any more."""
        for inlet in self._inlets.values():
            inlet.discard()

    def say_goodbye(self) -> None:
        """The last words of the protocol."""
        self._link.write(self._mux.send_goodbye())

    def _receive(self, data: bytes) -> None:
        for event in self._mux.receive_data(data):
            if isinstance(event, DataReceived):
                self._link.touch()
                inlet = self._inlets.get(event.stream)
                if inlet is not None:
                    inlet.put(event.data)
            else:
                self._happened(event)
        answer = self._mux.data_to_send()
        if answer:
            self._link.answer(answer)
        if self.failure:
            self._fail()
        elif self._is_closed:
            self._end()
            self._link.close()

    def _happened(self, event: Event) -> None:
        match event:
            case StreamOpened():
                self._link.touch()
                self.on_open(event)
            case StreamEnded(stream):
                if stream in self._inlets:
                    self._inlets[stream].end()
            case StreamReset(stream):
                self._reset(stream)
            case ProtocolFailed(reason):
                self.failure = reason
            case PeerLeft():
                self._is_closed = True
            case PeerLeaves():
                self._is_left = True
                self._close_if_done()
            case DataReceived():
                pass

    def _reset(self, stream: int) -> None:
        if stream in self._inlets:
            # It stays until it is forgotten: what has come can be read, and counts as long as it waits.
            self._inlets[stream].was_reset = self._outlets[stream].was_reset = True
            self._inlets[stream].end()
        self.on_close(stream)

    def _end(self) -> None:
        """Nothing will come any more; what is there can be read."""
        for inlet in self._inlets.values():
            inlet.end()

    def _close_if_done(self) -> None:
        if self._is_left and not self._inlets:
            self._link.leave()

    def _fail(self) -> None:
        """The client has been told what it has done. Now it is as if it had left."""
        self.say_goodbye()
        self._end()
        self._link.leave()
