"""WebSocket connections that carry Kubernetes' streams, on the sans-IO core of `websockets`.

Two forms: numbered channels (`channel.k8s.io` and its versions: each message is the channel's number and a piece of
data), and a tunnel (`SPDY/3.1+…`: the messages are a stream of SPDY bytes, their borders mean nothing). Not the choice
between them (`wire.negotiation`). Invariant: no more than one message of the client is held, and none is longer than
MAX_MESSAGE.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Final

from websockets import http11
from websockets.datastructures import Headers
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from cri_shim.model.streams import PIECE_BYTES
from cri_shim.wire.http_upgrade import Request
from cri_shim.wire.mux import DataReceived, Event, PeerLeft, ProtocolFailed, StreamEnded
from cri_shim.wire.spdy import Spdy

MAX_MESSAGE: Final = 1 << 20
"""Bytes; clients send 32 KiB and a channel's number."""

_NEGOTIATED: Final = frozenset({"sec-websocket-protocol", "sec-websocket-extensions"})
"""Headers that the library does not see: it refuses the slash in the tunnel's name, and there are no extensions."""
_STREAM_CLOSE: Final = 255
"""The channel of v5 that ends others: its data is the number of the one that ends."""
_DIGIT_ZERO: Final = ord("0")
"""Stands for channel 0 in the forms with base64, the characters behind it for the others."""
_DATA_OPCODES: Final = frozenset({Opcode.TEXT, Opcode.BINARY, Opcode.CONT})


class HandshakeRefused(Exception):
    """The request is no valid WebSocket handshake. `answer` is the HTTP response for it."""

    def __init__(self, answer: bytes) -> None:
        super().__init__("no valid WebSocket handshake")
        self.answer = answer


class WebSocket:
    """The server's end of one connection: whole messages in, frames out."""

    def __init__(self, request: Request, subprotocol: str) -> None:
        """`subprotocol` is what has been chosen of the client's list. Raises HandshakeRefused."""
        headers = [(name, value) for name, value in request.headers if name not in _NEGOTIATED]
        response = ServerProtocol().accept(http11.Request(request.target, Headers(headers)))
        if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            raise HandshakeRefused(response.serialize())
        if subprotocol:
            response.headers["Sec-WebSocket-Protocol"] = subprotocol
        self.handshake: Final = response.serialize()
        """The response that opens the connection."""
        self._core = ServerProtocol(state=State.OPEN, max_size=MAX_MESSAGE)
        self._message: list[bytes] = []
        self._answer = b""
        self._failed = False

    def receive_data(self, data: bytes) -> Iterator[bytes | Event]:
        """The messages that `data` completes; at the end PeerLeft or ProtocolFailed, where it ends."""
        if self._failed:
            return
        self._core.receive_data(data)
        events = self._core.events_received()
        self._answer += self._taken()
        for frame in events:
            if not isinstance(frame, Frame):
                continue
            if frame.opcode in _DATA_OPCODES:
                if frame.data:
                    self._message.append(bytes(frame.data))
                if frame.fin:
                    message = b"".join(self._message)
                    self._message.clear()
                    yield message
            elif frame.opcode is Opcode.CLOSE:
                yield PeerLeft()
        if self._core.parser_exc is not None:
            self._failed = True
            yield ProtocolFailed(str(self._core.parser_exc))

    def answers(self) -> bytes:
        """Pongs, and the answer to a close or to what is no WebSocket frame."""
        answer, self._answer = self._answer, b""
        return answer

    def message(self, data: bytes, *, text: bool = False) -> bytes:
        """One message to the client; nothing when the connection is closing."""
        if self._core.state is not State.OPEN:
            return b""
        if text:
            self._core.send_text(data)
        else:
            self._core.send_binary(data)
        return self._taken()

    def pong(self) -> bytes:
        """One that answers nothing, as RFC 6455 allows (5.5.3): clients leave that get none for a minute."""
        if self._core.state is not State.OPEN:
            return b""
        self._core.send_pong(b"")
        return self._taken()

    def close(self) -> bytes:
        """The normal end."""
        if self._core.state is not State.OPEN:
            return b""
        self._core.send_close(CloseCode.NORMAL_CLOSURE)
        return self._taken()

    def fail(self, code: CloseCode, reason: str) -> None:
        """The client's messages make no sense: `answers` has what it is told."""
        self._failed = True
        self._core.fail(code, reason)
        self._answer += self._taken()

    def _taken(self) -> bytes:
        return b"".join(self._core.data_to_send())


class Channels:
    """A `Mux` of numbered channels. All of them are open from the start; only in v5 a client can end one."""

    def __init__(
        self,
        socket: WebSocket,
        *,
        in_base64: bool,
        version: int,
        readable: Iterable[int],
        greetings: Mapping[int, bytes],
    ) -> None:
        """`readable` are those that the client writes to; `greetings` is what is sent at once, by channel."""
        self._socket = socket
        self._in_base64 = in_base64
        self._can_end = version >= 5
        self._readable = set(readable)
        self._greetings = b"".join(self.send_data(stream, data) for stream, data in greetings.items())

    def receive_data(self, data: bytes) -> list[Event]:
        """Bytes from the client, cut anywhere."""
        events: list[Event] = []
        for message in self._socket.receive_data(data):
            if not isinstance(message, bytes):
                events.append(message)
            elif not message:
                continue
            elif self._in_base64:
                events.extend(self._decoded(message))
            else:
                events.extend(self._pieces(message[0], message[1:]))
            if events and isinstance(events[-1], ProtocolFailed):
                break
        return events

    def data_to_send(self) -> bytes:
        """The greetings first, then what the protocol answers."""
        answer, self._greetings = self._greetings + self._socket.answers(), b""
        return answer

    def accept(self, stream: int) -> bytes:
        """Channels are there without being opened."""
        del stream
        return b""

    def send_data(self, stream: int, data: bytes) -> bytes:
        """One message."""
        if self._in_base64:
            return self._socket.message(bytes((_DIGIT_ZERO + stream,)) + base64.b64encode(data), text=True)
        return self._socket.message(bytes((stream,)) + data)

    def send_end(self, stream: int) -> bytes:
        """No version has a word for it; the close of the connection ends all channels."""
        del stream
        return b""

    def send_reset(self, stream: int) -> bytes:
        """Likewise; nothing is read from the channel any more."""
        self._readable.discard(stream)
        return b""

    def still_here(self) -> bytes:
        """A pong."""
        return self._socket.pong()

    def send_goodbye(self) -> bytes:
        """A close frame."""
        return self._socket.close()

    def _decoded(self, message: bytes) -> Iterator[Event]:
        try:
            stream, data = message[0] - _DIGIT_ZERO, base64.b64decode(message[1:], validate=True)
        except binascii.Error:
            reason = "a message that is not base64"
            self._socket.fail(CloseCode.INVALID_DATA, reason)
            yield ProtocolFailed(reason)
        else:
            yield from self._pieces(stream, data)

    def _pieces(self, stream: int, data: bytes) -> Iterator[Event]:
        if self._can_end and stream == _STREAM_CLOSE:
            if data and data[0] in self._readable:
                self._readable.discard(data[0])
                yield StreamEnded(data[0])
        elif stream in self._readable:
            for start in range(0, len(data), PIECE_BYTES):
                yield DataReceived(stream, data[start : start + PIECE_BYTES])


class Tunnel:
    """A `Mux` of SPDY streams whose bytes travel in binary messages."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._spdy = Spdy()
        self._failed = False

    def receive_data(self, data: bytes) -> list[Event]:
        """Bytes from the client, cut anywhere."""
        events: list[Event] = []
        if self._failed:
            return events
        for message in self._socket.receive_data(data):
            events.extend(self._spdy.receive_data(message) if isinstance(message, bytes) else [message])
            if events and isinstance(events[-1], ProtocolFailed):
                self._failed = True
                break
        return events

    def data_to_send(self) -> bytes:
        """What both protocols answer."""
        return self._wrapped(self._spdy.data_to_send()) + self._socket.answers()

    def accept(self, stream: int) -> bytes:
        """Let the client use a stream."""
        return self._wrapped(self._spdy.accept(stream))

    def send_data(self, stream: int, data: bytes) -> bytes:
        """One data frame in one message."""
        return self._wrapped(self._spdy.send_data(stream, data))

    def send_end(self, stream: int) -> bytes:
        """No more follows on this stream."""
        return self._wrapped(self._spdy.send_end(stream))

    def send_reset(self, stream: int) -> bytes:
        """Refuse or drop a stream."""
        return self._wrapped(self._spdy.send_reset(stream))

    def still_here(self) -> bytes:
        """A pong."""
        return self._socket.pong()

    def send_goodbye(self) -> bytes:
        """Both protocols say it."""
        return self._wrapped(self._spdy.send_goodbye()) + self._socket.close()

    def _wrapped(self, frames: bytes) -> bytes:
        return self._socket.message(frames) if frames else b""
