"""Header blocks of SPDY/3.1: name and value pairs, compressed by one zlib stream per direction (spec, 2.6.10).

Not frames (`wire.spdy`). Invariant: every block of a connection passes through here in wire order, that of a refused
stream too, or the state of the compression is lost; and no block expands to more than MAX_BLOCK bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Final

MAX_BLOCK: Final = 64 << 10
"""Bytes after decompression. What Kubernetes clients send is below 200."""
MAX_PAIRS: Final = 100

_NAMES: Final = (
    *("options", "head", "post", "put", "delete", "trace", "accept", "accept-charset", "accept-encoding"),
    *("accept-language", "accept-ranges", "age", "allow", "authorization", "cache-control", "connection"),
    *("content-base", "content-encoding", "content-language", "content-length", "content-location", "content-md5"),
    *("content-range", "content-type", "date", "etag", "expect", "expires", "from", "host", "if-match"),
    *("if-modified-since", "if-none-match", "if-range", "if-unmodified-since", "last-modified", "location"),
    *("max-forwards", "pragma", "proxy-authenticate", "proxy-authorization", "range", "referer", "retry-after"),
    *("server", "te", "trailer", "transfer-encoding", "upgrade", "user-agent", "vary", "via", "warning"),
    *("www-authenticate", "method", "get", "status", "200 OK", "version", "HTTP/1.1", "url", "public", "set-cookie"),
    *("keep-alive", "origin"),
)
_WORDS: Final = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
_LENGTH: Final = struct.Struct(">I")
DICTIONARY: Final = b"".join(_LENGTH.pack(len(name)) + name.encode() for name in _NAMES) + _WORDS.encode()
"""What both directions start from: names of headers with their lengths, then common values (spec, 2.6.10.1)."""


class BadHeaders(Exception):
    """A block that cannot be read. The connection is lost with it."""


class Compressor:
    """Our direction."""

    def __init__(self) -> None:
        # The smallest window that holds the dictionary: 10 KiB where the default takes 256.
        self._zlib = zlib.compressobj(wbits=11, memLevel=1, zdict=DICTIONARY)

    def block(self, headers: Mapping[str, str]) -> bytes:
        """One header block. Names are in lower case."""
        plain = [_LENGTH.pack(len(headers))]
        for text in (word for pair in headers.items() for word in pair):
            encoded = text.encode("latin-1")
            plain += [_LENGTH.pack(len(encoded)), encoded]
        return self._zlib.compress(b"".join(plain)) + self._zlib.flush(zlib.Z_SYNC_FLUSH)


class Decompressor:
    """The client's direction."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zdict=DICTIONARY)

    def headers(self, block: bytes) -> dict[str, str]:
        """The pairs of one block; several values of a name are joined by NUL. Raises BadHeaders."""
        try:
            plain = self._zlib.decompress(block, MAX_BLOCK)
        except zlib.error as error:
            raise BadHeaders(str(error)) from error
        if self._zlib.unconsumed_tail or len(plain) == MAX_BLOCK:
            msg = f"a header block of {MAX_BLOCK} bytes or more"
            raise BadHeaders(msg)
        if self._zlib.eof:
            msg = "the compression has ended"
            raise BadHeaders(msg)
        return _pairs(plain)


def _pairs(plain: bytes) -> dict[str, str]:
    words: list[str] = []
    try:
        (count,) = _LENGTH.unpack_from(plain)
        if count > MAX_PAIRS:
            msg = f"{count} headers, at most {MAX_PAIRS}"
            raise BadHeaders(msg)
        position = _LENGTH.size
        for _ in range(2 * count):
            (length,) = _LENGTH.unpack_from(plain, position)
            position += _LENGTH.size
            words.append(plain[position : position + length].decode("latin-1"))
            position += length
    except struct.error as error:
        msg = "a header block that is cut short"
        raise BadHeaders(msg) from error
    names = words[::2]
    if position != len(plain) or len(set(names)) != count or not all(name and name == name.lower() for name in names):
        msg = "a header block with bytes to spare, a name that stands twice, is empty or not in lower case"
        raise BadHeaders(msg)
    return dict(zip(names, words[1::2], strict=True))
