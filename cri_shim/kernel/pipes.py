"""The daemon's ends of a child's standard streams, driven by the event loop.

Not for long-lived streams with flow control. Invariant: a child never waits for us: its output is always read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Iterable
from typing import Final

_CHUNK: Final = 1 << 16


def give(streams: Iterable[int | str], owner: tuple[int, int]) -> None:
    """Let uid and gid open anew what of these is a pipe (`echo >/dev/stdout`). Descriptors, or paths below /proc.

    Nothing else changes hands: a device or a file may be somebody else's too. Gone = success.
    """
    for stream in streams:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if stat.S_ISFIFO(os.stat(stream).st_mode):  # noqa: PTH116  also a descriptor
                os.chown(stream, *owner)


class Feed:
    """Writes bytes to a child's stdin from the loop; a child that does not read them all is its own business."""

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)
        self.child_end, self._ours = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._ours, False)

    def begin(self) -> None:
        self.child_end = _closed(self.child_end)
        asyncio.get_running_loop().add_writer(self._ours, self._write)

    def close(self) -> None:
        self.child_end = _closed(self.child_end)
        if self._ours >= 0:
            asyncio.get_running_loop().remove_writer(self._ours)
            self._ours = _closed(self._ours)

    def _write(self) -> None:
        try:
            self._rest = self._rest[os.write(self._ours, self._rest) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._rest = self._rest[:0]
        if not self._rest:
            self.close()


class Drain:
    """Reads a child's output in the loop: keeps the first `limit` bytes, drops the rest, never stops reading."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._limit = limit
        self._ours, self.child_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._ours, False)

    def begin(self) -> None:
        self.child_end = _closed(self.child_end)
        asyncio.get_running_loop().add_reader(self._ours, self._read)

    def close(self) -> None:
        self.child_end = _closed(self.child_end)
        if self._ours >= 0:
            asyncio.get_running_loop().remove_reader(self._ours)
            self._ours = _closed(self._ours)
        if not self.ended.done():
            self.ended.set_result(None)

    def _read(self) -> None:
        try:
            chunk = os.read(self._ours, _CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            self.close()
        elif len(self.data) < self._limit:
            self.data += chunk[: self._limit - len(self.data)]


def _closed(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1
