"""The connections of an HTTP server: accepts them, waits for requests on them, has them answered elsewhere.

Not the answers (`http_places`). Heads are read here, in one thread, so that nobody who is slow with his takes a place
from others. A client that has ended its side gets its answer, however late; TCP tells it from one that has closed its
socket, as soon as the client's kernel has forgotten that (a minute). Invariant: nothing is done any more for a client
that is known to have gone, nor for one that may have while others wait.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from cri_shim.wire.http1 import BrokenMessage, Closed, Request
from handlers.wasmtime.wasip2.http_channel import prepared
from handlers.wasmtime.wasip2.http_connection import KEEP, Connection, Visit, is_served
from handlers.wasmtime.wasip2.http_errors import HttpError
from handlers.wasmtime.wasip2.waiter import FdSource, Timer, Waiter

CONNECTIONS: Final = 1000
"""At most so many at once, and half of the descriptors that a process may have; further ones wait in the backlog."""
_NS: Final = 1_000_000_000
HEAD: Final = 30 * _NS
"""How long a head may take, from its first byte on."""
_LINGER: Final = 2 * _NS
"""How long a client that is still sending has to read why it is not wanted."""
_SWEEP: Final = _NS
_NOT_SERVED: Final = 501
GONE: Final = 3 * _NS
"""Where others wait, who has ended its side and has been sent nothing for so long is taken for gone."""
_PROBES: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
)
"""The kernel asks every second whether it is still there: a reset, or half a minute without an answer, say no."""
_BUSY: Final = select.EPOLLRDHUP | select.EPOLLONESHOT


class Leaving:
    """A client that has ended its side, and what it is still being sent."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._sent = connection.channel.sent
        self._since = time.monotonic_ns()

    def is_over(self) -> bool:
        """It has been sent nothing for so long that it is taken for gone."""
        channel, now = self.connection.channel, time.monotonic_ns()
        if channel.sent != self._sent or channel.pending:
            self._sent, self._since = channel.sent, now
        return now - self._since >= GONE


class Listening:
    """`handlers.wasmtime.guest.Waits`. All the rest belongs to one thread."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        waiter: Waiter,
        answer: Callable[[Visit], None],
        are_waiting: Callable[[], bool],
        interrupt: Callable[[], None],
    ) -> None:
        """`answer` hands a visit to another thread, or has it wait for one: whether there are such is `are_waiting`.

        `interrupt` has who computes there see whether the client left.
        """
        self._listeners = list(listeners)
        self._waiter = waiter
        self._answer = answer
        self._are_waiting = are_waiting
        self._interrupt = interrupt
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._waiting: dict[int, Connection] = {}
        self._returned: deque[tuple[Connection, bool]] = deque()
        self._lock = threading.Lock()
        self._busy: dict[int, Connection] = {}
        self._leaving: dict[int, Leaving] = {}
        self._most = min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._accepting = False
        self._short = False
        self.draining = False

    def _give_back(self, connection: Connection, usable: bool) -> None:
        self._returned.append((connection, usable))
        self._rouse()

    def stop(self) -> None:
        """`Waits`: and with it what its requests wait for."""
        self._waiter.stop()

    def close_listeners(self) -> None:
        """`Waits`: `run` returns when the requests that are here have been answered."""
        self.draining = True
        self._rouse()

    def _rouse(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Serve, until the listeners are closed. Stopped when the guest is to stop."""
        sweep = time.monotonic_ns() + _SWEEP
        while not (self.draining and not self._busy):
            self._accept_or_not()
            timers = (Timer(sweep),) if self._waiting or self._leaving or self._short else ()
            self._waiter.wait((FdSource(self._epoll.fileno(), select.POLLIN), *timers))
            self._take_events()
            if time.monotonic_ns() >= sweep:
                self._let_go_of_the_late()
                self._part_with_the_gone()
                self._short = False
                sweep = time.monotonic_ns() + _SWEEP

    def close(self) -> None:
        """Close everything that is here."""
        for connection in tuple(self._waiting.values()):
            self._close(connection)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self._epoll.close()
        with self._lock:
            os.close(self._wake)
            self._wake = -1

    def _accept_or_not(self) -> None:
        if self.draining:
            for listener in self._listeners:
                listener.close()  # and with it out of the set
            self._listeners.clear()
            for connection in tuple(self._waiting.values()):
                if not connection.lingers:
                    self._close(connection)
            return
        wanted = len(self._waiting) + len(self._busy) < self._most and not self._short
        if wanted is not self._accepting:
            for listener in self._listeners:
                if wanted:
                    self._epoll.register(listener, select.EPOLLIN)
                else:
                    self._epoll.unregister(listener)
            self._accepting = wanted

    def _take_events(self) -> None:
        listeners = {listener.fileno(): listener for listener in self._listeners}
        events = self._epoll.poll(0)
        for fd, event in events:
            if fd in self._waiting:
                self._read(self._waiting[fd])
            elif fd in self._busy:
                self._leave(self._busy[fd], gone=bool(event & (select.EPOLLHUP | select.EPOLLERR)))
        # After them, as there may be new ones of the same numbers then.
        for fd, _ in events:
            if fd == self._wake:
                os.eventfd_read(self._wake)
                self._take_back()
            elif fd in listeners:
                self._accept(listeners[fd])

    def _leave(self, connection: Connection, *, gone: bool) -> None:
        """The client sends nothing more."""
        fd = connection.sock.fileno()
        if gone:
            self._leaving.pop(fd, None)
            self._take_for_gone(connection)
            return
        self._leaving[fd] = Leaving(connection)
        with contextlib.suppress(OSError):  # gone meanwhile, which the next event says
            for probe in _PROBES:
                connection.sock.setsockopt(*probe)
        self._epoll.modify(fd, select.EPOLLONESHOT)

    def _take_for_gone(self, connection: Connection) -> None:
        """End what is done for it, be that waiting or computing."""
        exchange = connection.exchange
        if exchange is not None:
            exchange.is_wanted = False
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
            self._interrupt()

    def _part_with_the_gone(self) -> None:
        if not (self.draining or self._are_waiting()):
            return
        for fd, leaving in tuple(self._leaving.items()):
            if leaving.is_over():
                del self._leaving[fd]
                self._take_for_gone(leaving.connection)

    def _take_back(self) -> None:
        while self._returned:
            connection, usable = self._returned.popleft()
            fd = connection.sock.fileno()
            del self._busy[fd]
            self._leaving.pop(fd, None)
            self._watch(connection)
            if usable and not self.draining:
                connection.deadline, connection.in_head = time.monotonic_ns() + KEEP, False
                self._look(connection)  # the next request may have come with this one
            else:
                self._part_with(connection)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(self._most - len(self._waiting) - len(self._busy)):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptors, or no memory: in a while there may be some
                self._short = True
                return
            connection = Connection(prepared(sock))
            self._epoll.register(sock, select.EPOLLIN)
            self._waiting[sock.fileno()] = connection
            self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            if connection.lingers:
                if connection.channel.receive() == b"":
                    self._close(connection)
            elif connection.receive():
                self._look(connection)
        except (HttpError, BrokenMessage):
            self._close(connection)

    def _look(self, connection: Connection) -> None:
        """Whether a head has come."""
        found = connection.look()
        if is_served(found):
            self._hand_over(connection, found)
        elif isinstance(found, Request):
            self._refuse(connection, _NOT_SERVED, "no tunnels")
        elif isinstance(found, BrokenMessage):
            self._refuse(connection, found.status, str(found))
        elif isinstance(found, Closed):
            self._close(connection)
        elif connection.peer.has_begun and not connection.in_head:
            connection.deadline, connection.in_head = time.monotonic_ns() + HEAD, True

    def _hand_over(self, connection: Connection, head: Request) -> None:
        fd = connection.sock.fileno()
        self._busy[fd] = self._waiting.pop(fd)
        self._epoll.modify(fd, _BUSY)
        self._answer(Visit(connection, head, last=lambda: self.draining, leave=self._give_back))

    def _refuse(self, connection: Connection, status: int, text: str) -> None:
        with contextlib.suppress(HttpError):
            connection.channel.queue(connection.peer.refuse(status, text))
            connection.channel.push()
        self._part_with(connection)

    def _part_with(self, connection: Connection) -> None:
        """Nothing more is said. Who still sends is listened to a little: a reset would take the answer from him."""
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
            return
        connection.deadline, connection.lingers = time.monotonic_ns() + _LINGER, True

    def _watch(self, connection: Connection) -> None:
        """It belongs to this thread."""
        fd = connection.sock.fileno()
        self._waiting[fd] = connection
        self._epoll.modify(fd, select.EPOLLIN)

    def _close(self, connection: Connection) -> None:
        del self._waiting[connection.sock.fileno()]
        connection.sock.close()  # and with it out of the set

    def _let_go_of_the_late(self) -> None:
        now = time.monotonic_ns()
        for connection in [connection for connection in self._waiting.values() if connection.deadline <= now]:
            self._close(connection)
