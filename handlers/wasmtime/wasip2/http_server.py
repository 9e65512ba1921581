"""The connections of an HTTP server: accepts them, waits for requests on them, has them answered elsewhere.

Not the answers (`http_proxy`). Heads are read here, in one thread, so that nobody who is slow with his takes a place
from others. Invariant: a connection belongs either to this thread or to the one that answers its request.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from cri_shim.wire.http1 import BrokenMessage, Closed, Request, Server
from handlers.wasmtime.wasip2.http_channel import Channel, prepared
from handlers.wasmtime.wasip2.http_errors import HttpError
from handlers.wasmtime.wasip2.http_exchange import Exchange
from handlers.wasmtime.wasip2.waiter import FdSource, Timer, Waiter

CONNECTIONS: Final = 1000
"""At most so many at once, and half of the descriptors that a process may have; further ones wait in the backlog."""
_NS: Final = 1_000_000_000
KEEP: Final = 75 * _NS
"""How long a connection waits for its next request."""
HEAD: Final = 30 * _NS
"""How long a head may take, from its first byte on."""
_LINGER: Final = 2 * _NS
"""How long a client that is still sending has to read why it is not wanted."""
_SWEEP: Final = _NS
_NOT_SERVED: Final = 501


GiveBack = Callable[[bool], None]


class Connection:
    """One client's."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.peer = Server()
        self.channel = Channel(sock)
        self.deadline = time.monotonic_ns() + KEEP
        self.in_head = False
        self.lingers = False


class Listening:
    """`handlers.wasmtime.guest.Waits`. All the rest belongs to one thread."""

    def __init__(
        self, listeners: Sequence[socket.socket], waiter: Waiter, answer: Callable[[Exchange, GiveBack], None]
    ) -> None:
        """`answer` hands the exchange to another thread, which gives the connection back: good for more, or not."""
        self._listeners = list(listeners)
        self._waiter = waiter
        self._answer = answer
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._waiting: dict[int, Connection] = {}
        self._returned: deque[tuple[Connection, bool]] = deque()
        self._lock = threading.Lock()
        self._busy = 0
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
            timers = (Timer(sweep),) if self._waiting or self._short else ()
            self._waiter.wait((FdSource(self._epoll.fileno(), select.POLLIN), *timers))
            self._take_events()
            if time.monotonic_ns() >= sweep:
                self._let_go_of_the_late()
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
        wanted = len(self._waiting) + self._busy < self._most and not self._short
        if wanted is not self._accepting:
            for listener in self._listeners:
                if wanted:
                    self._epoll.register(listener, select.EPOLLIN)
                else:
                    self._epoll.unregister(listener)
            self._accepting = wanted

    def _take_events(self) -> None:
        listeners = {listener.fileno(): listener for listener in self._listeners}
        for fd, _ in self._epoll.poll(0):
            if fd == self._wake:
                os.eventfd_read(self._wake)
                self._take_back()
            elif fd in listeners:
                self._accept(listeners[fd])
            elif fd in self._waiting:
                self._read(self._waiting[fd])

    def _take_back(self) -> None:
        while self._returned:
            connection, usable = self._returned.popleft()
            self._busy -= 1
            if usable and not self.draining:
                connection.deadline, connection.in_head = time.monotonic_ns() + KEEP, False
                self._watch(connection)
                self._look(connection)  # the next request may have come with this one
            else:
                self._part_with(connection)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(self._most - len(self._waiting) - self._busy):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptors, or no memory: in a while there may be some
                self._short = True
                return
            connection = Connection(prepared(sock))
            self._watch(connection)
            self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.channel.receive()
            if connection.lingers:
                if data == b"":
                    self._close(connection)
                return
            if data is not None:
                connection.peer.receive(data)
        except (HttpError, BrokenMessage):
            self._close(connection)
            return
        if data is not None:
            self._look(connection)

    def _look(self, connection: Connection) -> None:
        """Whether a head has come."""
        try:
            event = connection.peer.next_event()
        except BrokenMessage as error:
            self._refuse(connection, error.status, str(error))
            return
        if isinstance(event, Request) and event.method == "CONNECT":
            self._refuse(connection, _NOT_SERVED, "no tunnels")
        elif isinstance(event, Request):
            self._forget(connection)
            self._busy += 1
            exchange = Exchange(connection.peer, connection.channel, event, last=lambda: self.draining)
            self._answer(exchange, functools.partial(self._give_back, connection))
        elif isinstance(event, Closed):
            self._close(connection)
        elif connection.peer.has_begun and not connection.in_head:
            connection.deadline, connection.in_head = time.monotonic_ns() + HEAD, True

    def _refuse(self, connection: Connection, status: int, text: str) -> None:
        with contextlib.suppress(HttpError):
            connection.channel.queue(connection.peer.refuse(status, text))
            connection.channel.push()
        self._forget(connection)
        self._part_with(connection)

    def _part_with(self, connection: Connection) -> None:
        """Nothing more is said. Who still sends is listened to a little: a reset would take the answer from him."""
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            connection.sock.close()
            return
        connection.deadline, connection.lingers = time.monotonic_ns() + _LINGER, True
        self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        self._waiting[connection.sock.fileno()] = connection
        self._epoll.register(connection.sock, select.EPOLLIN)

    def _forget(self, connection: Connection) -> None:
        del self._waiting[connection.sock.fileno()]
        self._epoll.unregister(connection.sock)

    def _close(self, connection: Connection) -> None:
        self._forget(connection)
        connection.sock.close()

    def _let_go_of_the_late(self) -> None:
        now = time.monotonic_ns()
        for connection in [connection for connection in self._waiting.values() if connection.deadline <= now]:
            self._close(connection)
