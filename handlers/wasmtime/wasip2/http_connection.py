"""One client's connection to the HTTP server, and a visit of it to the thread that answers its requests.

Not the answers (`http_exchange`). Invariant: a connection belongs either to the thread that waits for requests
(`http_server`) or, for a visit, to the one that answers them.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from typing import Final, TypeGuard

from cri_shim.wire.http1 import BrokenMessage, Event, Request, Server
from handlers.wasmtime.wasip2.http_channel import Channel
from handlers.wasmtime.wasip2.http_errors import HttpError
from handlers.wasmtime.wasip2.http_exchange import Exchange
from handlers.wasmtime.wasip2.waiter import FdSource, Timer, Waiter

_NS: Final = 1_000_000_000
KEEP: Final = 75 * _NS
"""How long a connection waits for its next request."""
SOON: Final = 10_000_000
"""So long of it with the thread that has answered the last one: to change threads twice costs more than a request."""


class Connection:
    """One client's."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.peer = Server()
        self.channel = Channel(sock)
        self.deadline = time.monotonic_ns() + KEEP
        self.in_head = False
        self.lingers = False
        self.exchange: Exchange | None = None
        """The one that is under way."""
        self._found: Event | BrokenMessage | None = None

    def look(self) -> Event | BrokenMessage | None:
        """What has come; None = nothing that is whole."""
        found, self._found = self._found, None
        if found is not None:
            return found
        try:
            return self.peer.next_event()
        except BrokenMessage as error:
            return error

    def receive(self) -> bool:
        """Take what is there: whether it was anything, be it the end. HttpError, BrokenMessage."""
        data = self.channel.receive()
        if data is not None:
            self.peer.receive(data)
        return data is not None

    def next_request(self, waiter: Waiter) -> Request | None:
        """The next one, if it comes soon; anything else is left for `look`. HttpError, BrokenMessage, Stopped."""
        found = self.look()
        if found is None:
            waiter.wait((FdSource(self.sock.fileno(), select.POLLIN), Timer(time.monotonic_ns() + SOON)))
            found = self.look() if self.receive() else None
        if is_served(found):
            return found
        self._found = found
        return None


class Visit:
    """A connection in the hands of the thread that answers its requests."""

    def __init__(
        self, connection: Connection, head: Request, last: Callable[[], bool], leave: Callable[[Connection, bool], None]
    ) -> None:
        """`last`: whether the connection is not to be used again; `leave` gives it back: good for more, or not."""
        self._connection = connection
        self._last = last
        self._leave = leave
        self.exchange = self._exchange(head)

    def _exchange(self, head: Request) -> Exchange:
        made = Exchange(self._connection.peer, self._connection.channel, head, last=self._last)
        self._connection.exchange = made
        return made

    def goes_on(self, waiter: Waiter) -> bool:
        """Whether there is another exchange: the client has sent its next request soon after. Stopped."""
        self._connection.exchange = None
        if self._last():
            return False
        try:
            head = self._connection.next_request(waiter)
        except (HttpError, BrokenMessage):  # who has the connection next finds it too
            return False
        if head is not None:
            self.exchange = self._exchange(head)
        return head is not None

    def end(self, usable: bool) -> None:
        """The connection belongs to the other thread again."""
        self._connection.exchange = None
        self._leave(self._connection, usable)


def is_served(found: Event | BrokenMessage | None) -> TypeGuard[Request]:
    """Whether it is a request that can be answered: no tunnels."""
    return isinstance(found, Request) and found.method != "CONNECT"
