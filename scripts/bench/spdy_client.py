"""A SPDY client that only counts: fast enough that what is measured is the server.

Not a client to use: one session, no retries, and nothing is looked at but lengths and ends of streams.
"""

from __future__ import annotations

import socket
import struct
import zlib
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from cri_shim.wire.spdy_headers import DICTIONARY

_FIN = 1
_DATA_LIMIT = 1 << 20
_buffer = bytearray(_DATA_LIMIT)


class Session:
    """A connection after its upgrade, with its streams open: they have the numbers 1, 3, 5…"""

    def __init__(self, url: str, protocol: str, streams: Sequence[Mapping[str, str]]) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=120)
        self._socket.sendall(
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: 0\r\nConnection: Upgrade\r\n"
            f"Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._take(1)
        if b" 101 " not in head:
            raise SystemExit(f"streaming: {head.decode(errors='replace').splitlines()[0]}")
        self._open(streams)

    def count(self, stream: int) -> int:
        """The bytes that come on a stream until it ends."""
        total = 0
        while True:
            first, second = (int(word) for word in struct.unpack(">II", self._take(8)))
            length, ends = second & 0xFF_FFFF, second >> 24 & _FIN
            self._skip(length)
            if first >> 31:
                if first & 0xFFFF in {3, 7}:
                    raise SystemExit(f"streaming: the server ended stream or session early, after {total} bytes")
                continue
            if first == stream:
                total += length
                if ends:
                    return total

    def close(self) -> None:
        self._socket.close()

    def _open(self, streams: Sequence[Mapping[str, str]]) -> None:
        deflate = zlib.compressobj(zdict=DICTIONARY)
        for number, headers in enumerate(streams):
            plain = struct.pack(">I", len(headers))
            for word in (word for pair in headers.items() for word in pair):
                plain += struct.pack(">I", len(word)) + word.encode()
            block = deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH)
            body = struct.pack(">IIBB", 2 * number + 1, 0, 0, 0) + block
            self._socket.sendall(struct.pack(">II", 0x8003_0001, len(body)) + body)

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            got = self._socket.recv(size - len(data))
            if not got:
                raise SystemExit("streaming: the server closed the connection early")
            data += got
        return data

    def _skip(self, size: int) -> None:
        while size:
            got = self._socket.recv_into(_buffer, min(size, _DATA_LIMIT))
            if not got:
                raise SystemExit("streaming: the server closed the connection early")
            size -= got
