"""WASI preview 1 functions on sockets, from the guest's memory and back (witx: `fd_*`, `sock_*`).

Not the sockets (`handlers.wasmtime.sockets`). Invariant: every pointer is checked against the memory's size before it
is followed; one that is outside is FAULT, and nothing has happened.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from handlers.wasmtime.errnos import Errno
from handlers.wasmtime.sockets import FIRST_CONNECTION, Sockets

_SOCKET_STREAM: Final = 6
"""`filetype.socket_stream`."""
_ALL_RIGHTS: Final = (1 << 30) - 1
_FDSTAT: Final = struct.Struct("<BxH4xQQ")
_FILESTAT: Final = struct.Struct("<QQB7xQQQQQ")
_IOVEC: Final = struct.Struct("<II")
_MOST_BUFFERS: Final = 1024
_PEEK: Final = 1
_WAITALL: Final = 2


class Memory(Protocol):
    """Of the guest."""

    def read(self, at: int, size: int) -> bytes | None:
        """A copy; None when it is not all inside the memory."""
        ...

    def write(self, at: int, data: bytes) -> bool:
        """Whether it fitted."""
        ...

    def view(self, at: int, size: int) -> memoryview | None:
        """The bytes themselves, to be written to; None when they are not all inside."""
        ...


@dataclass(frozen=True, slots=True)
class Calls:
    """The functions of one guest. `has_directories`: it has preopens behind its listeners."""

    sockets: Sockets
    has_directories: bool

    def owns(self, fd: int) -> bool:
        """Whether it is a socket's, open or closed."""
        return self.sockets.is_listener(fd) or fd >= FIRST_CONNECTION

    def fd_read(self, memory: Memory, fd: int, vectors: int, count: int, result: int) -> Errno:
        buffers = _buffers(memory, vectors, count)
        if isinstance(buffers, Errno):
            return buffers
        return _told(memory, result, self.sockets.receive(fd, buffers))

    def fd_write(self, memory: Memory, fd: int, vectors: int, count: int, result: int) -> Errno:
        buffers = _buffers(memory, vectors, count)
        if isinstance(buffers, Errno):
            return buffers
        return _told(memory, result, self.sockets.send(fd, buffers))

    def fd_close(self, memory: Memory, fd: int) -> Errno:
        del memory
        return self.sockets.close_one(fd)

    def fd_fdstat_get(self, memory: Memory, fd: int, result: int) -> Errno:
        flags = self.sockets.flags(fd)
        if flags is None:
            return Errno.BADF
        return _stored(memory, result, _FDSTAT.pack(_SOCKET_STREAM, flags, _ALL_RIGHTS, _ALL_RIGHTS))

    def fd_fdstat_set_flags(self, memory: Memory, fd: int, flags: int) -> Errno:
        del memory
        return self.sockets.set_flags(fd, flags)

    def fd_filestat_get(self, memory: Memory, fd: int, result: int) -> Errno:
        if fd not in self.sockets:
            return Errno.BADF
        return _stored(memory, result, _FILESTAT.pack(0, 0, _SOCKET_STREAM, 1, 0, 0, 0, 0))

    def fd_prestat_get(self, memory: Memory, fd: int, result: int) -> Errno:
        """Who looks for directories stops at BADF, so a listener in front of some says that it is none."""
        del memory, result
        return Errno.NOTDIR if self.has_directories and self.sockets.is_listener(fd) else Errno.BADF

    def sock_accept(self, memory: Memory, fd: int, flags: int, result: int) -> Errno:
        if memory.read(result, 4) is None:
            return Errno.FAULT
        return _told(memory, result, self.sockets.accept(fd, flags))

    def sock_recv(  # noqa: PLR0913, PLR0917  the witx's own
        self, memory: Memory, fd: int, vectors: int, count: int, flags: int, size: int, out_flags: int
    ) -> Errno:
        buffers = _buffers(memory, vectors, count)
        if isinstance(buffers, Errno):
            return buffers
        if flags & ~(_PEEK | _WAITALL):
            return Errno.INVAL
        received = self.sockets.receive(fd, buffers, peek=bool(flags & _PEEK))
        told = _told(memory, size, received)
        return told if told is not Errno.SUCCESS else _stored(memory, out_flags, b"\0\0")

    def sock_send(self, memory: Memory, fd: int, vectors: int, count: int, flags: int, size: int) -> Errno:
        if flags:
            return Errno.INVAL
        return self.fd_write(memory, fd, vectors, count, size)

    def sock_shutdown(self, memory: Memory, fd: int, how: int) -> Errno:
        del memory
        return self.sockets.shutdown(fd, how)


PARAMETERS: Final[Mapping[str, int]] = {
    "fd_read": 4,
    "fd_write": 4,
    "fd_close": 1,
    "fd_fdstat_get": 2,
    "fd_fdstat_set_flags": 2,
    "fd_filestat_get": 2,
    "fd_prestat_get": 2,
    "sock_accept": 3,
    "sock_recv": 6,
    "sock_send": 5,
    "sock_shutdown": 2,
}
"""The functions, each with its number of parameters, which are all i32, as is the result."""


def function(calls: Calls, name: str) -> Callable[..., Errno]:
    """The method of that name."""
    found: Callable[..., Errno] = getattr(calls, name)
    return found


def _buffers(memory: Memory, vectors: int, count: int) -> list[memoryview] | Errno:
    if count > _MOST_BUFFERS:
        return Errno.INVAL
    table = memory.read(vectors, count * _IOVEC.size)
    if table is None:
        return Errno.FAULT
    views = [memory.view(at, size) for at, size in _IOVEC.iter_unpack(table) if size]
    if None in views:
        return Errno.FAULT
    return [view for view in views if view is not None]


def _told(memory: Memory, result: int, answer: int) -> Errno:
    """An Errno as it is; a number goes to where the guest wants it."""
    return answer if isinstance(answer, Errno) else _stored(memory, result, answer.to_bytes(4, "little"))


def _stored(memory: Memory, at: int, data: bytes) -> Errno:
    return Errno.SUCCESS if memory.write(at, data) else Errno.FAULT
