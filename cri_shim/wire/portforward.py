"""The words of port-forward: which streams belong together, and to which port.

For each TCP connection that it forwards, a client opens two streams with the same request id and port: one for errors,
one for data. Not what carries them (`wire.mux`). Invariant: a stream is in at most one pair, and a pair is given out
once.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

STREAM_TYPE: Final = "streamtype"
PORT: Final = "port"
REQUEST_ID: Final = "requestid"
MAX_REQUEST_ID: Final = 256
"""Characters; clients count from 0."""
_ERROR: Final = "error"
_DATA: Final = "data"
_OLD_DISTANCE: Final = 2
"""Of the numbers of data and error stream, where an old client gives no request id."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The streams of one forwarded connection."""

    port: int
    data: int
    error: int


class BadStream(Exception):
    """A stream that cannot be part of a pair: it is reset, and the others go on."""


class Pairing:
    """Puts streams together as they are opened (`wire.spdy`)."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, int]] = {}
        self._ports: dict[str, int] = {}

    def opened(self, stream: int, headers: Mapping[str, str]) -> Pair | None:
        """The pair that this stream completes. Raises BadStream."""
        kind = headers.get(STREAM_TYPE, "")
        if kind not in {_ERROR, _DATA}:
            msg = f"{STREAM_TYPE} {kind!r} is neither error nor data"
            raise BadStream(msg)
        port = parse_port(headers.get(PORT, ""))
        request = headers.get(REQUEST_ID) or str(stream if kind == _ERROR else stream - _OLD_DISTANCE)
        if len(request) > MAX_REQUEST_ID:
            msg = f"a request id of {len(request)} characters, at most {MAX_REQUEST_ID}"
            raise BadStream(msg)
        waiting = self._waiting.setdefault(request, {})
        if kind in waiting or self._ports.setdefault(request, port) != port:
            msg = f"request {request} has a stream of type {kind} already, or another port"
            raise BadStream(msg)
        waiting[kind] = stream
        if len(waiting) == 1:
            return None
        self._forget(request)
        return Pair(port, waiting[_DATA], waiting[_ERROR])

    def closed(self, stream: int) -> bool:
        """Forget a stream that still waits for its partner; whether it did."""
        for request, waiting in self._waiting.items():
            if stream in waiting.values():
                self._forget(request)
                return True
        return False

    def _forget(self, request: str) -> None:
        del self._waiting[request], self._ports[request]


def parse_port(text: str) -> int:
    """1 to 65535. Raises BadStream."""
    if text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 1 << 16:
        return int(text)
    msg = f"port {text!r} is not between 1 and 65535"
    raise BadStream(msg)


def channels(ports: tuple[int, ...]) -> list[Pair]:
    """On a WebSocket: two channels for each port, in order."""
    return [Pair(port, 2 * number, 2 * number + 1) for number, port in enumerate(ports)]


def greeting(port: int) -> bytes:
    """What the server writes first into each channel of a WebSocket."""
    return struct.pack("<H", port)
