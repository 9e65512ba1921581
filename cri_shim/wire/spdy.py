"""SPDY/3.1 as Kubernetes clients speak it: the server's end of one connection (spec: SPDY protocol, draft 3.1).

Not flow control: the clients' library neither sends nor honours WINDOW_UPDATE, so only TCP slows a sender down, and
one stream that nobody reads holds up all others. Not server push: the server opens no stream. Invariant: what is held
of the input is less than one control frame.

A stream is open in both directions once its SYN_STREAM is accepted; FIN ends one direction, RST_STREAM both. It is
forgotten when both have ended.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from cri_shim.model.streams import PIECE_BYTES
from cri_shim.wire.mux import DataReceived, Event, PeerLeaves, ProtocolFailed, StreamEnded, StreamOpened, StreamReset
from cri_shim.wire.spdy_headers import BadHeaders, Compressor, Decompressor

MAX_CONTROL: Final = 16 << 10
"""Bytes of one control frame's payload. What Kubernetes clients send is below 200."""
MAX_STREAMS: Final = 1000
"""Open at a time; a further one is refused."""

_CONTROL: Final = 0x8000_0000
_VERSION: Final = 3
_FIN: Final = 0x01
_UNIDIRECTIONAL: Final = 0x02
_SYN_STREAM, _SYN_REPLY, _RST_STREAM, _PING, _GOAWAY, _HEADERS = 1, 2, 3, 6, 7, 8
_PROTOCOL_ERROR, _INVALID_STREAM, _REFUSED_STREAM, _CANCEL, _STREAM_ALREADY_CLOSED = 1, 2, 3, 5, 9
_FRAME: Final = struct.Struct(">II")
_WORD: Final = struct.Struct(">I")
_TWO_WORDS: Final = struct.Struct(">II")
_ID: Final = 0x7FFF_FFFF


class _Violation(Exception):
    """The client has broken the rules of the connection as a whole."""


@dataclass(slots=True)
class _Stream:
    """The directions that are still open."""

    reads: bool
    """The client sends."""
    writes: bool
    """We may send."""
    accepted: bool = False


class Spdy:
    """A `Mux`."""

    def __init__(self) -> None:
        self._streams: dict[int, _Stream] = {}
        self._last = 0
        self._held = bytearray()
        self._wanted = _FRAME.size
        """Bytes that have to be there before the input is worth a look."""
        self._left = 0
        """Bytes of the current data frame, or of a frame to skip, that have not come yet."""
        self._current = 0
        """The stream they belong to; 0 = nobody's."""
        self._ends = False
        self._answers: list[bytes] = []
        self._failed = False
        self._handlers: Final[dict[int, Callable[[int, bytes], Iterable[Event]]]] = {
            _SYN_STREAM: self._syn_stream,
            _SYN_REPLY: self._ignored_headers,
            _RST_STREAM: self._rst_stream,
            _PING: self._ping,
            _GOAWAY: self._peer_goes,
            _HEADERS: self._headers,
        }
        self._compressor = Compressor()
        self._decompressor = Decompressor()

    def receive_data(self, data: bytes) -> list[Event]:
        """Bytes from the client, cut anywhere."""
        if self._failed:
            return []
        if self._held:
            self._held += data
            if len(self._held) < self._wanted:
                return []
            data = bytes(self._held)
            self._held.clear()
        events: list[Event] = []
        try:
            rest = self._parse(data, events)
        except (_Violation, BadHeaders) as violation:
            self._failed = True
            self._answers.append(self._goaway(_PROTOCOL_ERROR))
            events.append(ProtocolFailed(str(violation)))
        else:
            self._held += data[rest:]
        return events

    def data_to_send(self) -> bytes:
        """What the protocol itself answers to what was received."""
        answers = b"".join(self._answers)
        self._answers.clear()
        return answers

    def accept(self, stream: int) -> bytes:
        """SYN_REPLY without headers. Data before it would be dropped by the client."""
        state = self._streams.get(stream)
        if state is None or state.accepted:
            return b""
        state.accepted = True
        if not state.writes:
            self._forget_ended(stream, state)
            return b""
        return _control(_SYN_REPLY, 0, _WORD.pack(stream) + self._compressor.block({}))

    def send_data(self, stream: int, data: bytes) -> bytes:
        """One data frame."""
        state = self._streams.get(stream)
        if state is None or not state.writes:
            return b""
        return _FRAME.pack(stream, len(data)) + data

    def send_end(self, stream: int) -> bytes:
        """An empty data frame with FIN."""
        state = self._streams.get(stream)
        if state is None or not state.writes:
            return b""
        state.writes = False
        self._forget_ended(stream, state)
        return _FRAME.pack(stream, _FIN << 24)

    def send_reset(self, stream: int) -> bytes:
        """RST_STREAM: refused if the stream has not been accepted, cancelled otherwise."""
        state = self._streams.pop(stream, None)
        if state is None:
            return b""
        return _reset(stream, _CANCEL if state.accepted else _REFUSED_STREAM)

    def still_here(self) -> bytes:
        """Nothing: clients ping, and do not mind how long the answer takes."""
        return b""

    def send_goodbye(self) -> bytes:
        """GOAWAY with status OK."""
        if self._failed:
            return b""
        return self._goaway(0)

    def _goaway(self, status: int) -> bytes:
        return _control(_GOAWAY, 0, _TWO_WORDS.pack(self._last, status))

    def _parse(self, data: bytes, events: list[Event]) -> int:
        """Everything in `data` up to an incomplete head or control frame; where that begins."""
        position, end = 0, len(data)
        while True:
            if self._left:
                if position == end:
                    break
                position = self._payload(data, position, events)
                continue
            if end - position < _FRAME.size:
                self._wanted = _FRAME.size
                break
            first, second = _FRAME.unpack_from(data, position)
            flags, length = second >> 24, second & 0xFF_FFFF
            body = position + _FRAME.size
            if not first & _CONTROL:
                self._begin_data(first, flags, length, events)
                position = body
                continue
            if not self._is_known(first):
                self._left, self._current, self._ends = length, 0, False
                position = body
                continue
            if length > MAX_CONTROL:
                msg = f"a control frame of {length} bytes, at most {MAX_CONTROL}"
                raise _Violation(msg)
            if end - body < length:
                self._wanted = _FRAME.size + length
                break
            position = body + length
            self._control(first & 0xFFFF, flags, data[body:position], events)
        return position

    def _is_known(self, first: int) -> bool:
        """What is not known is skipped by its length (2.2.1), and so are SETTINGS and WINDOW_UPDATE."""
        version, kind = (first & ~_CONTROL) >> 16, first & 0xFFFF
        if version != _VERSION:
            msg = f"a control frame of version {version}, not {_VERSION}"
            raise _Violation(msg)
        return kind in self._handlers

    def _begin_data(self, stream: int, flags: int, length: int, events: list[Event]) -> None:
        state = self._streams.get(stream)
        self._left, self._current, self._ends = length, stream, bool(flags & _FIN)
        if state is None or not state.reads:
            self._current = 0
            if state is not None:
                self._drop(stream, _STREAM_ALREADY_CLOSED, events)
            elif stream > self._last or not stream % 2:
                # One that has been closed meanwhile is no fault: its frames were under way.
                self._answers.append(_reset(stream, _INVALID_STREAM))
        elif not length and self._ends:
            self._end(stream, events)

    def _payload(self, data: bytes, position: int, events: list[Event]) -> int:
        size = min(self._left, len(data) - position, PIECE_BYTES)
        self._left -= size
        stream = self._current
        if stream and stream in self._streams:
            events.append(DataReceived(stream, data[position : position + size]))
            if self._ends and not self._left:
                self._end(stream, events)
        return position + size

    def _end(self, stream: int, events: list[Event]) -> None:
        state = self._streams[stream]
        if state.reads:
            state.reads = False
            events.append(StreamEnded(stream))
            self._forget_ended(stream, state)

    def _forget_ended(self, stream: int, state: _Stream) -> None:
        if not state.reads and not state.writes:
            del self._streams[stream]

    def _drop(self, stream: int, status: int, events: list[Event]) -> None:
        """Reset a stream of which the client has broken the rules."""
        del self._streams[stream]
        self._answers.append(_reset(stream, status))
        events.append(StreamReset(stream))

    def _control(self, kind: int, flags: int, body: bytes, events: list[Event]) -> None:
        try:
            events.extend(self._handlers[kind](flags, body))
        except struct.error as error:
            msg = f"a control frame of type {kind} that is cut short"
            raise _Violation(msg) from error

    def _syn_stream(self, flags: int, body: bytes) -> Iterator[Event]:
        stream, _ = _TWO_WORDS.unpack_from(body)
        stream &= _ID
        headers = self._decompressor.headers(body[_TWO_WORDS.size + 2 :])
        if not stream % 2 or stream <= self._last:
            msg = f"stream {stream} after {self._last}: a client's numbers are odd and grow"
            raise _Violation(msg)
        self._last = stream
        if len(self._streams) >= MAX_STREAMS:
            self._answers.append(_reset(stream, _REFUSED_STREAM))
            return
        state = _Stream(reads=not flags & _FIN, writes=not flags & _UNIDIRECTIONAL)
        self._streams[stream] = state
        yield StreamOpened(stream, headers)
        if not state.reads:
            yield StreamEnded(stream)

    def _ignored_headers(self, _flags: int, body: bytes) -> Iterable[Event]:
        """SYN_REPLY: we have opened nothing that could be replied to."""
        _WORD.unpack_from(body)
        self._decompressor.headers(body[_WORD.size :])
        return ()

    def _headers(self, flags: int, body: bytes) -> Iterable[Event]:
        """Nothing is in them for us, but they can end a stream."""
        (stream,) = _WORD.unpack_from(body)
        self._decompressor.headers(body[_WORD.size :])
        events: list[Event] = []
        if flags & _FIN and stream & _ID in self._streams:
            self._end(stream & _ID, events)
        return events

    def _rst_stream(self, _flags: int, body: bytes) -> Iterator[Event]:
        stream, _ = _TWO_WORDS.unpack_from(body)
        if self._streams.pop(stream & _ID, None) is not None:
            yield StreamReset(stream & _ID)

    def _ping(self, _flags: int, body: bytes) -> Iterable[Event]:
        """The client's have odd numbers; an even one would be the answer to one of ours."""
        (number,) = _WORD.unpack_from(body)
        if number % 2:
            self._answers.append(_control(_PING, 0, _WORD.pack(number)))
        return ()

    def _peer_goes(self, _flags: int, body: bytes) -> Iterable[Event]:
        _WORD.unpack_from(body)
        return (PeerLeaves(),)


def _control(kind: int, flags: int, body: bytes) -> bytes:
    return _FRAME.pack(_CONTROL | _VERSION << 16 | kind, flags << 24 | len(body)) + body


def _reset(stream: int, status: int) -> bytes:
    return _control(_RST_STREAM, 0, _TWO_WORDS.pack(stream, status))
