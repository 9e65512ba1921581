"""The listening sockets of a guest and the connections that it accepts: WASI preview 1 calls on real sockets.

Not the guest's memory (`handlers.wasmtime.socket_calls`) and not its other descriptors, which the engine has. Listeners
have the descriptors 3, 4, …, as with socket activation (sd_listen_fds(3)), connections those from 65536 on. All sockets
are non-blocking; a call that has to wait does so together with the guest's stop. Invariant: after `close` nothing is
open, and every call answers BADF.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from handlers.wasmtime.errnos import Errno

_T = TypeVar("_T")

FIRST_LISTENER: Final = 3
FIRST_CONNECTION: Final = 1 << 16
NONBLOCK: Final = 4
"""`fdflags.nonblock`."""
_BACKLOG: Final = 4096
_RECEIVE_ONLY: Final = 1
_SEND_ONLY: Final = 2
_ERRNOS: Final = {
    errno.EAGAIN: Errno.AGAIN,
    errno.ECONNABORTED: Errno.CONNABORTED,
    errno.ECONNRESET: Errno.CONNRESET,
    errno.EINVAL: Errno.INVAL,
    errno.ENOTCONN: Errno.NOTCONN,
    errno.EPIPE: Errno.PIPE,
    errno.ETIMEDOUT: Errno.TIMEDOUT,
    errno.EMFILE: Errno.MFILE,
    errno.ENFILE: Errno.NFILE,
    errno.ENOBUFS: Errno.NOBUFS,
    errno.ENOMEM: Errno.NOMEM,
}


class Stopped(Exception):
    """The guest is to stop."""


@dataclass(slots=True)
class _Entry:
    sock: socket.socket
    nonblock: bool


def listen(ports: Sequence[int]) -> list[socket.socket]:
    """Listen on each port on all addresses of the calling thread's network namespace, IPv4 and IPv6.

    OSError, whose `filename` is the port that could not be had; nothing is left open then.
    """
    with contextlib.ExitStack() as stack:
        made = []
        for port in ports:
            try:
                made.append(stack.enter_context(listener("", port)))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(port)) from error
        stack.pop_all()
        return made


def listener(address: str, port: int) -> socket.socket:
    """Listen there; empty = on all addresses, IPv4 and IPv6. OSError."""
    if address:
        return _bound(socket.AF_INET6 if ":" in address else socket.AF_INET, address, port)
    try:
        return _bound(socket.AF_INET6, "::", port, dual=True)
    except OSError as error:
        if error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
            raise
        return _bound(socket.AF_INET, "0.0.0.0", port)  # noqa: S104  a kernel, or a namespace, without IPv6


def _bound(family: socket.AddressFamily, address: str, port: int, *, dual: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if family is socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


class Sockets:
    """Belongs to the guest's thread, but for `stop`, `close_listeners`.

    `resting` is entered while the guest waits: it uses no CPU then.
    """

    def __init__(
        self, listeners: Sequence[socket.socket], resting: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        # Non-blocking for the guest too: Go's runtime polls only what says so, and cannot change it for a listener.
        self._entries = {FIRST_LISTENER + number: _Entry(sock, True) for number, sock in enumerate(listeners)}
        self._listeners = frozenset(self._entries)
        self._resting = resting
        self._next = FIRST_CONNECTION
        self.traffic = 0
        """Goes up with each connection, and with each call that moves bytes."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._lock = threading.Lock()

    def __contains__(self, fd: int) -> bool:
        return fd in self._entries

    def is_listener(self, fd: int) -> bool:
        """Also one that has been closed."""
        return fd in self._listeners

    def stop(self) -> None:
        """End every wait, now and from now on. Any thread; closed already is success."""
        with self._lock:
            self._stopping = True
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def close_listeners(self) -> None:
        """Accept no more. Who waits for a connection learns it. Any thread."""
        for fd in self._listeners:
            entry = self._entries.get(fd)
            if entry is not None:
                # Not closed: another thread may be polling it. From here on it is readable, and accept fails.
                with contextlib.suppress(OSError):
                    entry.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close everything."""
        for entry in self._entries.values():
            entry.sock.close()
        self._entries.clear()
        with self._lock:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1

    def accept(self, fd: int, flags: int) -> int | Errno:
        """A new descriptor."""
        entry = self._entries.get(fd)
        if entry is None:
            return Errno.BADF
        accepted = self._when_ready(entry, select.POLLIN, entry.sock.accept)
        if isinstance(accepted, Errno):
            return accepted
        sock, _ = accepted
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number = self._next
        self._next += 1
        self._entries[number] = _Entry(sock, bool(flags & NONBLOCK))
        self.traffic += 1
        return number

    def receive(self, fd: int, buffers: Sequence[memoryview], *, peek: bool = False) -> int | Errno:
        """Bytes received into the buffers, 0 at the end."""
        entry = self._entries.get(fd)
        if entry is None:
            return Errno.BADF
        flags = socket.MSG_PEEK if peek else 0
        moved = self._when_ready(entry, select.POLLIN, lambda: entry.sock.recvmsg_into(buffers, 0, flags)[0])
        return moved if peek else self._count(moved)

    def send(self, fd: int, buffers: Sequence[memoryview]) -> int | Errno:
        """Bytes that were taken."""
        entry = self._entries.get(fd)
        if entry is None:
            return Errno.BADF
        moved = self._when_ready(entry, select.POLLOUT, lambda: entry.sock.sendmsg(buffers, (), socket.MSG_NOSIGNAL))
        return self._count(moved)

    def _count(self, moved: int | Errno) -> int | Errno:
        if moved and not isinstance(moved, Errno):
            self.traffic += 1
        return moved

    def shutdown(self, fd: int, how: int) -> Errno:
        """`how`: `sdflags`, bit 0 receive, bit 1 send."""
        entry = self._entries.get(fd)
        if entry is None:
            return Errno.BADF
        ways = {_RECEIVE_ONLY: socket.SHUT_RD, _SEND_ONLY: socket.SHUT_WR}
        return _tried(lambda: entry.sock.shutdown(ways.get(how, socket.SHUT_RDWR)))

    def close_one(self, fd: int) -> Errno:
        """Close a descriptor."""
        entry = self._entries.pop(fd, None)
        if entry is None:
            return Errno.BADF
        entry.sock.close()
        return Errno.SUCCESS

    def flags(self, fd: int) -> int | None:
        """`fdflags`; None = no such descriptor."""
        entry = self._entries.get(fd)
        return None if entry is None else NONBLOCK if entry.nonblock else 0

    def set_flags(self, fd: int, flags: int) -> Errno:
        """Non-blocking or not is all that a socket has."""
        entry = self._entries.get(fd)
        if entry is None:
            return Errno.BADF
        if flags & ~NONBLOCK:
            return Errno.INVAL
        entry.nonblock = bool(flags & NONBLOCK)
        return Errno.SUCCESS

    def wait(self, watched: Mapping[int, int], seconds: float) -> dict[int, int]:
        """Wait until one of the descriptors (with `select.POLLIN` or POLLOUT) is ready, at most so long.

        The ready ones with their poll(2) events; one that is not open counts as ready. Stopped as soon as the guest is
        to stop.
        """
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        numbers: dict[int, int] = {}
        gone: dict[int, int] = {}
        for fd, events in watched.items():
            entry = self._entries.get(fd)
            if entry is None:
                gone[fd] = select.POLLNVAL
            else:
                numbers[entry.sock.fileno()] = fd
                poller.register(entry.sock, events)
        happened = poller.poll(0)
        if not happened and not gone and seconds > 0:
            with self._resting():
                happened = poller.poll(seconds * 1000)
        if self._stopping:
            raise Stopped
        return {**gone, **{numbers[number]: events for number, events in happened if number in numbers}}

    def _when_ready(self, entry: _Entry, event: int, call: Callable[[], _T]) -> _T | Errno:
        while True:
            if self._stopping:
                raise Stopped
            try:
                return call()
            except BlockingIOError:
                if entry.nonblock:
                    return Errno.AGAIN
            except OSError as error:
                return _ERRNOS.get(error.errno or 0, Errno.IO)
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            poller.register(entry.sock, event)
            with self._resting():
                poller.poll()


def _tried(call: Callable[[], object]) -> Errno:
    try:
        call()
    except OSError as error:
        return _ERRNOS.get(error.errno or 0, Errno.IO)
    return Errno.SUCCESS
