"""Our ends of pipes and terminals whose other end a process holds: read and written with flow control, in the loop.

Not for output that is kept in memory (`kernel.pipes`). They satisfy `Source` and `Sink` of `cri_shim.model.streams`.
Invariant: nothing is read before somebody wants it, so that a slow reader stops the process and not the daemon.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
import termios

from cri_shim.kernel import tty
from cri_shim.model.streams import PIECE_BYTES


class ReadEnd:
    """The end of a pipe, or a terminal, that a process writes to. One reader at a time."""

    def __init__(self, fd: int) -> None:
        """`fd` becomes ours, and non-blocking."""
        os.set_blocking(fd, False)
        self._fd = fd
        self._left: int | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """The next piece; empty at the end, and after `close`."""
        while self._fd >= 0 and self._left != 0:
            try:
                data = os.read(self._fd, PIECE_BYTES if self._left is None else min(PIECE_BYTES, self._left))
            except BlockingIOError:
                await self._readable()
            except OSError as error:
                if error.errno != errno.EIO:  # what a terminal says when no process has it open any more
                    raise
                return b""
            else:
                if self._left is not None:
                    self._left -= len(data)
                return data
        return b""

    def finish(self) -> None:
        """Take what has been written so far for all that comes, whoever still holds the other end."""
        if self._fd >= 0:
            (self._left,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, b"\0" * 4))
            self._wake()

    def close(self) -> None:
        """The process gets SIGPIPE or EPIPE from now on. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._waiter is not None:
                asyncio.get_running_loop().remove_reader(fd)
                self._wake()
            os.close(fd)

    async def _readable(self) -> None:
        loop, fd = asyncio.get_running_loop(), self._fd
        self._waiter = loop.create_future()
        loop.add_reader(fd, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._fd == fd:
                loop.remove_reader(fd)

    def _wake(self) -> None:
        if self._waiter is not None:
            _done(self._waiter)


class _Writer:
    """What both kinds of input share. One writer at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiter: asyncio.Future[None] | None = None

    async def write(self, data: bytes) -> None:
        """Returns when all is on its way. ConnectionError when nobody can read it any more."""
        rest = memoryview(data)
        while rest:
            if self._fd < 0:
                raise BrokenPipeError
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                await self._writable()
            except OSError as error:
                if error.errno != errno.EIO:  # as in `ReadEnd.read`
                    raise
                raise BrokenPipeError from error

    async def _writable(self) -> None:
        loop, fd = asyncio.get_running_loop(), self._fd
        self._waiter = loop.create_future()
        loop.add_writer(fd, _done, self._waiter)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._fd == fd:
                loop.remove_writer(fd)


class WriteEnd(_Writer):
    """The end of a pipe that a process reads from."""

    def __init__(self, fd: int) -> None:
        """`fd` becomes ours, and non-blocking."""
        os.set_blocking(fd, False)
        super().__init__(fd)

    async def close(self) -> None:
        """The process reads end-of-file. A second call does nothing."""
        self.abandon()

    def abandon(self) -> None:
        """The same for those who cannot wait."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._waiter is not None:
                asyncio.get_running_loop().remove_writer(fd)
                _done(self._waiter)
            os.close(fd)


class TerminalInput(_Writer):
    """The keys of a terminal, by its master end, non-blocking, which stays its owner's."""

    async def close(self) -> None:
        """A program that reads lines reads end-of-file: a terminal has no end of its own, it is told by a character."""
        await self.write(tty.end_of_file(self._fd))


def _done(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
