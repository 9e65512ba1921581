"""The uncompressed bytes of one layer, read from a blob that may still be arriving, with their digest (the diff ID).

Runs in an unpacker. The content says how it is compressed, as with other runtimes: media types in the wild are wrong.
Invariant: every byte of the uncompressed stream is hashed exactly once, in order, also those that no entry needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol, cast

_INPUT = 1 << 18
_OUTPUT = 1 << 20  # of one step: bounds the memory, whatever the ratio
_AHEAD = 4  # steps
_ZEROS = bytes(_OUTPUT)
_HOLE = 1 << 16
_GZIP = b"\x1f\x8b"
_GZIP_WINDOW = 31  # zlib's code for "gzip header, largest window"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # behind one byte; zstd:chunked keeps its table of contents in such frames


class StreamError(ValueError):
    """The blob is damaged, or compressed in a way that is not supported; the text says what."""


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


class Growing:
    """A file that somebody else still writes: a byte in the pipe `progress` means that there is more, its end that
    there is all.
    """

    def __init__(self, file: int, progress: int) -> None:
        self._file = file
        self._progress = progress
        self._whole = False

    def read(self, size: int) -> bytes:
        """At least one and at most `size` bytes; none at the end. Waits for them."""
        while True:
            data = os.read(self._file, size)
            if data or self._whole:
                return data
            self._whole = not os.read(self._progress, 1 << 12)


class _Ahead:
    """Decompresses and hashes in a thread of its own, a little ahead of who takes the pieces.

    Neither needs the interpreter for long, so that two processors work on one layer.
    """

    def __init__(self, pieces: Iterator[bytes], damage: tuple[type[Exception], ...]) -> None:
        self.digest = hashlib.sha256()
        self._pieces = pieces
        self._damage = damage
        self._ready: queue.Queue[bytes | Exception] = queue.Queue(_AHEAD)
        self._thread: threading.Thread | None = None

    def next(self) -> bytes:
        """The next piece; empty at the end. Raises StreamError; not to be called after either."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        piece = self._ready.get()
        if isinstance(piece, self._damage):
            msg = f"the compressed data is damaged: {piece}"
            raise StreamError(msg)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def _run(self) -> None:
        try:
            for piece in self._pieces:
                self.digest.update(piece)
                self._ready.put(piece)
            self._ready.put(b"")
        except Exception as error:  # noqa: BLE001  raised where the pieces are taken
            self._ready.put(error)


class LayerStream:
    """`read`, `copy_to` and `skip` consume the stream; `finish` drains it."""

    def __init__(self, blob: Growing) -> None:
        self._pending = memoryview(b"")
        self._ended = False
        self._ahead = _Ahead(*_decompressed(blob))

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

    def copy_to(self, fd: int, size: int) -> int:
        """Write `size` bytes to a file; StreamError when there are fewer.

        Long runs of zeros become holes, so that they cost no disk. Returns how many bytes were written.
        """
        written, ends_in_hole = 0, False
        while size:
            part = self._take(size)
            if not part:
                raise StreamError("the layer ends within a file")
            size -= len(part)
            ends_in_hole = len(part) >= _HOLE and not part[0] and bytes(part) == _ZEROS[: len(part)]
            if ends_in_hole:
                os.lseek(fd, len(part), os.SEEK_CUR)
                continue
            written += len(part)
            while part:
                part = part[os.write(fd, part) :]
        if ends_in_hole:
            os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))
        return written

    def skip(self, size: int) -> None:
        """Leave out up to `size` bytes."""
        while size and (part := self._take(size)):
            size -= len(part)

    def finish(self) -> str:
        """Read to the end; the digest of all."""
        while self._take(_OUTPUT):
            pass
        return f"sha256:{self._ahead.digest.hexdigest()}"

    def _take(self, size: int) -> memoryview:
        """At least one and at most `size` bytes; none at the end."""
        if not self._pending and not self._ended:
            piece = self._ahead.next()
            self._ended = not piece
            self._pending = memoryview(piece)
        taken, self._pending = self._pending[:size], self._pending[size:]
        return taken


def _decompressed(blob: Growing) -> tuple[Iterator[bytes], tuple[type[Exception], ...]]:
    """The uncompressed bytes, piece by piece, none of them empty; and what is raised when they are damaged."""
    first = _at_least(len(_ZSTD), b"", blob)
    if first.startswith(_GZIP):
        return _gunzipped(first, blob), _DAMAGE
    if not _is_zstd(first):
        return _plain(first, blob), ()
    try:
        # Here and not where it is used: after the chroot nothing is imported.
        if sys.version_info >= (3, 14):
            from compression import zstd  # noqa: PLC0415
        else:
            from backports import zstd  # noqa: PLC0415
    except ImportError:
        raise StreamError("the layer is compressed with zstd, for which this Python has no library") from None
    return _unzstd(first, blob, zstd.ZstdDecompressor), (zstd.ZstdError,)


def _plain(data: bytes, blob: Growing) -> Iterator[bytes]:
    while data:
        yield data
        data = blob.read(_OUTPUT)


def _gunzipped(data: bytes, blob: Growing) -> Iterator[bytes]:
    """A gzip file is a series of members; builders that seek in layers write thousands."""
    while data.strip(b"\0"):  # padding after the last member; what follows zeros is not looked at
        if not data.startswith(_GZIP):
            raise StreamError("the compressed data is followed by something else")
        member = _decompressobj(wbits=_GZIP_WINDOW)
        while True:
            chunk = member.decompress(data, _OUTPUT)
            data = member.unconsumed_tail
            if chunk:
                yield chunk
            if member.eof:
                break
            if not chunk and not data:
                data = _more(blob)
        data = _at_least(len(_GZIP), member.unused_data, blob)


class _Frame(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def _unzstd(data: bytes, blob: Growing, begin: Callable[[], _Frame]) -> Iterator[bytes]:
    """A series of frames."""
    while data:
        if not _is_zstd(data):
            raise StreamError("the compressed data is followed by something else")
        frame = begin()
        while True:
            chunk = frame.decompress(data, _OUTPUT)
            data = b""
            if chunk:
                yield chunk
            if frame.eof:
                break
            if frame.needs_input:
                data = _more(blob)
        data = _at_least(len(_ZSTD), frame.unused_data, blob)


def _is_zstd(data: bytes) -> bool:
    return data.startswith(_ZSTD) or (data[1:4] == _ZSTD_SKIPPABLE and data[0] >> 4 == 5)


def _more(blob: Growing) -> bytes:
    data = blob.read(_INPUT)
    if not data:
        raise StreamError("the compressed data ends early")
    return data


def _at_least(size: int, data: bytes, blob: Growing) -> bytes:
    """`data` and what follows, until it is so long or at its end."""
    while len(data) < size and (more := blob.read(_INPUT)):
        data += more
    return data
