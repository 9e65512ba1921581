"""A SPDY/3.1 client's end, written from the specification and apart from `cri_shim.wire.spdy`, for tests of it.

It believes what it is told: whole frames in, tuples out. Invariant: no byte of the server is left over unnoticed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from cri_shim.wire.spdy_headers import DICTIONARY

FIN = 1
UNIDIRECTIONAL = 2


@dataclass
class SpdyPeer:
    """Frames to the server and from it."""

    opened: int = -1
    replied: set[int] = field(default_factory=set)
    received: dict[int, bytearray] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    resets: dict[int, int] = field(default_factory=dict)
    pings: list[int] = field(default_factory=list)
    goaways: list[tuple[int, int]] = field(default_factory=list)
    held: bytes = b""

    def __post_init__(self) -> None:
        self.compress = zlib.compressobj(zdict=DICTIONARY)
        self.decompress = zlib.decompressobj(zdict=DICTIONARY)

    def block(self, headers: Mapping[str, str]) -> bytes:
        plain = struct.pack(">I", len(headers))
        for name, value in headers.items():
            for text in (name.encode(), value.encode()):
                plain += struct.pack(">I", len(text)) + text
        return self.compress.compress(plain) + self.compress.flush(zlib.Z_SYNC_FLUSH)

    def open(self, headers: Mapping[str, str], flags: int = 0, stream: int = 0) -> bytes:
        """SYN_STREAM with the next number, or the one that is given; `opened` has it then."""
        self.opened = stream or self.opened + 2
        return control(1, flags, struct.pack(">IIBB", self.opened, 0, 0, 0) + self.block(headers))

    def receive(self, data: bytes) -> None:
        """Take note of all whole frames."""
        data = self.held + data
        while len(data) >= 8:
            first, second = struct.unpack_from(">II", data)
            length, flags = second & 0xFF_FFFF, second >> 24
            if len(data) < 8 + length:
                break
            body, data = data[8 : 8 + length], data[8 + length :]
            if first >> 31:
                self._control(first, body)
            else:
                assert first in self.replied, f"data on stream {first} before its reply"
                assert first not in self.ended, f"data on stream {first} behind its end"
                self.received.setdefault(first, bytearray()).extend(body)
                if flags & FIN:
                    self.ended.append(first)
        self.held = data

    def _control(self, first: int, body: bytes) -> None:
        assert first >> 16 == 0x8003
        (number,) = struct.unpack_from(">I", body)
        match first & 0xFFFF:
            case 2:
                assert self.decompress.decompress(body[4:]) == bytes(4)
                self.replied.add(number)
            case 3:
                self.resets[number] = struct.unpack(">I", body[4:])[0]
            case 6:
                self.pings.append(number)
            case 7:
                self.goaways.append((number, struct.unpack(">I", body[4:])[0]))
            case kind:
                raise AssertionError(f"a frame of type {kind}")


def control(kind: int, flags: int, body: bytes, version: int = 3) -> bytes:
    return struct.pack(">II", 1 << 31 | version << 16 | kind, flags << 24 | len(body)) + body


def data(stream: int, content: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">II", stream, flags << 24 | len(content)) + content


def reset(stream: int, status: int = 5) -> bytes:
    return control(3, 0, struct.pack(">II", stream, status))


def ping(number: int) -> bytes:
    return control(6, 0, struct.pack(">I", number))


def goaway(last: int = 0, status: int = 0) -> bytes:
    return control(7, 0, struct.pack(">II", last, status))
