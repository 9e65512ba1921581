"""What happens on a connection that carries several streams, whatever carries them: SPDY, WebSocket, or SPDY in it.

Not a protocol: `wire.spdy` and `wire.websocket` are. Invariant: how the input was cut into reads shows only in how the
data of a stream is cut, and after `ProtocolFailed` nothing comes any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The client wants a stream; it waits for `accept` or `send_reset`."""

    stream: int
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DataReceived:
    """A piece of at most PIECE_BYTES, never empty."""

    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The client sends no more on this stream; it still reads."""

    stream: int


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The client neither sends nor reads on this stream any more."""

    stream: int


@dataclass(frozen=True, slots=True)
class PeerLeaves:
    """The client opens no more streams; those that are open go on."""


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """The client has closed the connection as the protocol wants it; `data_to_send` has the answer."""


@dataclass(frozen=True, slots=True)
class ProtocolFailed:
    """The client has broken the rules; `data_to_send` has what it is told about it."""

    reason: str


Event = StreamOpened | DataReceived | StreamEnded | StreamReset | PeerLeaves | PeerLeft | ProtocolFailed


class Mux(Protocol):
    """The server's end of one connection. What is sent is returned, to be written in this order."""

    def receive_data(self, data: bytes) -> list[Event]:
        """Bytes from the client, cut anywhere."""
        ...

    def data_to_send(self) -> bytes:
        """What the protocol itself answers to what was received: pongs, resets, the word of a failure."""
        ...

    def accept(self, stream: int) -> bytes:
        """Let the client use a stream that it has opened."""
        ...

    def send_data(self, stream: int, data: bytes) -> bytes:
        """At most PIECE_BYTES. Nothing for a stream that cannot be written to any more."""
        ...

    def send_end(self, stream: int) -> bytes:
        """No more follows on this stream (half close)."""
        ...

    def send_reset(self, stream: int) -> bytes:
        """Refuse a stream, or drop it in both directions."""
        ...

    def still_here(self) -> bytes:
        """For a client that waits for the answer to a ping while it is not read; nothing where none waits for it."""
        ...

    def send_goodbye(self) -> bytes:
        """The connection ends as it should. Nothing can be sent after it."""
        ...
