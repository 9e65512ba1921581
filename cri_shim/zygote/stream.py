"""The uncompressed bytes of one layer, read from a blob, with their digest (the diff ID).

Runs in an unpacker. Invariant: every byte of the uncompressed stream is hashed exactly once, in order, also those that
no entry needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable
from typing import Protocol, cast

_INPUT = 1 << 17
_OUTPUT = 1 << 20  # of one step: bounds the memory, whatever the ratio
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_GZIP_WINDOW = 31  # zlib's code for "gzip header, largest window"


class StreamError(ValueError):
    """The blob is not what its media type says, or is damaged; the text says what."""


class _Inflater(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def unconsumed_tail(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


_decompressobj: Callable[..., _Inflater] = zlib.decompressobj
_DAMAGE: tuple[type[Exception], ...] = (zlib.error,)
with contextlib.suppress(ImportError):  # no wheel for this machine: half the speed
    from isal import igzip_lib, isal_zlib

    _decompressobj = isal_zlib.decompressobj
    _DAMAGE = (zlib.error, cast("type[Exception]", igzip_lib.IsalError))  # its stub says an instance


class LayerStream:
    """`read`, `copy_to` and `skip` consume the stream; `finish` drains it."""

    def __init__(self, blob: int, *, compressed: bool) -> None:
        self._blob = blob
        self._digest = hashlib.sha256()
        self._pending = memoryview(b"")
        self._input = os.read(blob, _INPUT)
        self._inflater: _Inflater | None = None
        is_gzip = self._input.startswith(_GZIP)
        if self._input.startswith(_ZSTD):
            raise StreamError("the layer is compressed with zstd, which is not supported")
        if compressed and not is_gzip:
            raise StreamError("the media type says gzip, the layer is not")
        if not compressed and is_gzip:
            raise StreamError("the layer is compressed with gzip, its media type says that it is not")
        if is_gzip:
            self._inflater = _decompressobj(wbits=_GZIP_WINDOW)

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, or fewer at the end."""
        if len(self._pending) >= size:
            taken, self._pending = self._pending[:size], self._pending[size:]
            return bytes(taken)
        parts = []
        while size and (part := self._take(size)):
            parts.append(bytes(part))
            size -= len(part)
        return b"".join(parts)

    def copy_to(self, fd: int, size: int) -> None:
        """Write `size` bytes to a file; StreamError when there are fewer."""
        while size:
            part = self._take(size)
            if not part:
                raise StreamError("the layer ends within a file")
            size -= len(part)
            while part:
                part = part[os.write(fd, part) :]

    def skip(self, size: int) -> None:
        """Leave out up to `size` bytes."""
        while size and (part := self._take(size)):
            size -= len(part)

    def finish(self) -> str:
        """Read to the end; the digest of all."""
        while self._take(_OUTPUT):
            pass
        return f"sha256:{self._digest.hexdigest()}"

    def _take(self, size: int) -> memoryview:
        """At least one and at most `size` bytes; none at the end."""
        if not self._pending:
            chunk = self._next_chunk()
            self._digest.update(chunk)
            self._pending = memoryview(chunk)
        taken, self._pending = self._pending[:size], self._pending[size:]
        return taken

    def _next_chunk(self) -> bytes:
        """The next uncompressed bytes; empty at the end."""
        if self._inflater is None:
            chunk, self._input = self._input, os.read(self._blob, _OUTPUT)
            return chunk
        try:
            while True:
                if self._inflater.eof and not self._begin_member():
                    return b""
                chunk = self._inflater.decompress(self._input, _OUTPUT)
                self._input = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
                if chunk:
                    return chunk
                if not self._inflater.eof and not self._refill():
                    raise StreamError("the compressed data ends early")
        except _DAMAGE as error:
            msg = f"the compressed data is damaged: {error}"
            raise StreamError(msg) from None

    def _begin_member(self) -> bool:
        """A gzip file is a series of members; builders that seek in layers write thousands. False at the end."""
        while len(self._input) < len(_GZIP) and self._refill():
            pass
        if not self._input.strip(b"\0"):
            return False  # padding after the last member; what follows zeros is not looked at
        if not self._input.startswith(_GZIP):
            raise StreamError("the compressed data is followed by something else")
        self._inflater = _decompressobj(wbits=_GZIP_WINDOW)
        return True

    def _refill(self) -> bool:
        more = os.read(self._blob, _INPUT)
        self._input += more
        return bool(more)
