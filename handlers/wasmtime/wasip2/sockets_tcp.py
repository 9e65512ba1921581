"""`wasi:sockets/tcp` and `tcp-create-socket`.

     Default ─start-listen▶ Listening            (accept)
        └────start-connect▶ Connecting ─finish-connect▶ Connected
                                └──────failed──────────▶ Closed

Sockets of the kernel, made in the worker's network namespace, which is the pod's. Invariant: a descriptor is closed
when the socket and both streams have been dropped, each direction shut down when its stream is.
"""

from __future__ import annotations

import enum
import errno
import select
import socket
from collections.abc import Callable
from typing import Final

from handlers.wasmtime.wasip2 import sockets_options as options
from handlers.wasmtime.wasip2.descriptors import allowed_socket
from handlers.wasmtime.wasip2.interface import Failure, Interface, methods
from handlers.wasmtime.wasip2.poll import Pollable
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.sockets_network import (
    FAMILY_NAMES,
    Address,
    Network,
    error_code,
    from_native,
    from_wit,
    new_socket,
    tried,
)
from handlers.wasmtime.wasip2.streams import PERMIT, InputStream, OutputStream, StreamClosed, StreamFailed
from handlers.wasmtime.wasip2.waiter import READY, Interest, Source, Waiter
from handlers.wasmtime.wasip2.world import World

_BACKLOG: Final = 128
"""Of who does not say; what Rust's and Go's libraries ask for."""
_LARGEST_BACKLOG: Final = (1 << 31) - 1
_SECOND: Final = 1_000_000_000
_LONGEST_KEEPALIVE: Final = 32767
"""Seconds (linux/tcp.h: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL)."""
_MOST_KEEPALIVES: Final = 127
"""MAX_TCP_KEEPCNT."""
_LOST_IN_QUEUE: Final = frozenset(
    {
        *(errno.ECONNRESET, errno.ENETRESET, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN),
        *(errno.ENETUNREACH, errno.EPROTO, errno.ENOPROTOOPT, errno.ENONET, errno.EOPNOTSUPP),
    }
)
"""What Linux says of a connection that failed while it waited to be accepted (accept(2))."""


class _State(enum.Enum):
    DEFAULT = enum.auto()
    LISTENING = enum.auto()
    CONNECTING = enum.auto()
    CONNECTED = enum.auto()
    CLOSED = enum.auto()


class _Shared:
    """A socket of the kernel and how many hold it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._holders = 0

    def hold(self) -> None:
        self._holders += 1

    def release(self) -> None:
        self._holders -= 1
        if not self._holders:
            self.sock.close()


class TcpInput(InputStream):
    """What comes."""

    def __init__(self, waiter: Waiter, shared: _Shared) -> None:
        super().__init__(waiter)
        self._shared = shared
        self._ended = False
        shared.hold()

    def refuse_ended(self) -> None:
        """`InputStream`."""
        if self._ended:
            raise StreamClosed

    def receive(self, size: int) -> bytes:
        """`InputStream`."""
        self.refuse_ended()
        try:
            data = self._shared.sock.recv(size)
        except BlockingIOError:
            return b""
        except OSError as error:
            self._ended = True
            raise StreamFailed(str(error), error) from None
        if not data:
            self._ended = True
            raise StreamClosed
        return data

    def end(self) -> None:
        """Nothing more is to come."""
        if not self._ended:
            self._ended = True
            _shut(self._shared.sock, socket.SHUT_RD)

    def source(self) -> Source:
        """`InputStream`."""
        return _Dynamic(lambda: READY if self._ended else _until(self._shared.sock, select.POLLIN))

    def close(self) -> None:
        """`Resource`."""
        self.end()
        self._shared.release()


class TcpOutput(OutputStream):
    """What goes. What the kernel does not take at once it keeps, and takes nothing more meanwhile."""

    def __init__(self, waiter: Waiter, shared: _Shared) -> None:
        super().__init__(waiter)
        self._shared = shared
        self._pending = b""
        self._ending = False
        self._error: OSError | None = None
        shared.hold()

    def capacity(self) -> int:
        """`OutputStream`."""
        self._push()
        if self._ending:
            raise StreamClosed
        return 0 if self._pending else PERMIT

    def send(self, data: bytes) -> None:
        """`OutputStream`."""
        self._pending += data
        self._push()

    def flushed(self) -> bool:
        """`OutputStream`."""
        self._push()
        return not self._pending

    def _push(self) -> None:
        if self._error is not None:
            raise StreamClosed
        try:
            while self._pending:
                self._pending = self._pending[self._shared.sock.send(self._pending, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            return
        except OSError as error:
            self._error, self._pending = error, b""
            if error.errno == errno.EPIPE:
                raise StreamClosed from None
            raise StreamFailed(str(error), error) from None
        if self._ending:
            _shut(self._shared.sock, socket.SHUT_WR)

    def end(self) -> None:
        """Nothing more is to go, once what was taken has gone."""
        if not self._ending:
            self._ending = True
            if self._error is None:
                self._push()

    def source(self) -> Source:
        """`OutputStream`."""
        return _Dynamic(self._interest)

    def _interest(self) -> Interest:
        if self._error is not None or (self._ending and not self._pending):
            return READY
        return _until(self._shared.sock, select.POLLOUT)

    def close(self) -> None:
        """What was taken goes out first, as a process would have left it to the kernel."""
        try:
            self.end()
            self.blocking_flush()
        except Failure:
            pass  # nobody is there any more to be told
        finally:
            self._shared.release()


class TcpSocket(Resource, resource=True):
    """`tcp-socket`."""

    def __init__(self, world: World, sock: socket.socket, peer: Address | None = None) -> None:
        self._world = world
        self._sock = sock
        self._shared = _Shared(sock)
        self._shared.hold()
        self._state = _State.DEFAULT if peer is None else _State.CONNECTED
        self._peer = peer
        self._bound = peer is not None
        self._backlog = _BACKLOG
        self._doing = ""
        self._error: OSError | None = None
        self._closed_by = ""
        self._streams: tuple[TcpInput, TcpOutput] | None = None

    def start_bind(self, _network: Network, value: tuple[str, dict[str, object]]) -> None:
        """`tcp-socket.start-bind`."""
        self._refuse_while_busy()
        address = from_wit(value)
        if self._state is not _State.DEFAULT or self._bound:
            raise Failure("invalid-state")
        if address.family != self._sock.family or not address.is_unicast or not address.is_plain:
            raise Failure("invalid-argument")
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # tcp.wit asks for it
        tried(lambda: self._sock.bind(address.native))
        self._bound, self._doing = True, "bind"

    def finish_bind(self) -> None:
        """`tcp-socket.finish-bind`."""
        self._finish("bind")

    def start_connect(self, _network: Network, value: tuple[str, dict[str, object]]) -> None:
        """`tcp-socket.start-connect`."""
        self._refuse_while_busy()
        address = from_wit(value)
        if self._state is not _State.DEFAULT:
            raise Failure("invalid-state")
        if address.family != self._sock.family or not address.is_unicast or not address.is_plain:
            raise Failure("invalid-argument")
        if address.is_unspecified or not address.port:
            raise Failure("invalid-argument")
        self._state, self._doing, self._peer = _State.CONNECTING, "connect", address
        try:
            self._sock.connect(address.native)
        except BlockingIOError:
            pass  # EINPROGRESS
        except OSError as error:
            self._error = error

    def finish_connect(self) -> tuple[TcpInput, TcpOutput]:
        """`tcp-socket.finish-connect`."""
        if self._doing != "connect":
            raise Failure("not-in-progress")
        if self._error is None and not _is_ready(self._sock, select.POLLOUT):
            raise Failure("would-block")
        self._doing = ""
        number = self._error.errno if self._error else self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._state = _State.CLOSED
            # Without a free port of its own Linux says that the address is not available (connect(2)).
            no_port = number == errno.EADDRNOTAVAIL
            self._closed_by = "address-in-use" if no_port else error_code(OSError(number, ""))
            raise Failure(self._closed_by)
        self._state, self._bound = _State.CONNECTED, True
        return self.streams()

    def streams(self) -> tuple[TcpInput, TcpOutput]:
        """Of a connection that has just been made."""
        self._streams = TcpInput(self._world.waiter, self._shared), TcpOutput(self._world.waiter, self._shared)
        return self._streams

    def start_listen(self) -> None:
        """`tcp-socket.start-listen`."""
        self._refuse_while_busy()
        if self._state is not _State.DEFAULT or not self._bound:
            raise Failure("invalid-state")
        tried(lambda: self._sock.listen(self._backlog))
        self._state, self._doing = _State.LISTENING, "listen"
        self._world.listeners.add(self._sock)

    def finish_listen(self) -> None:
        """`tcp-socket.finish-listen`."""
        self._finish("listen")

    def accept(self) -> tuple[TcpSocket, TcpInput, TcpOutput]:
        """`tcp-socket.accept`."""
        if self._state is not _State.LISTENING or self._doing:
            raise Failure("invalid-state")
        try:
            sock, address = self._sock.accept()
            allowed_socket(sock).setblocking(False)
        except OSError as error:
            raise Failure("connection-aborted" if error.errno in _LOST_IN_QUEUE else error_code(error)) from None
        made = TcpSocket(self._world, sock, from_native(sock.family, address))
        return made, *made.streams()

    def local_address(self) -> tuple[str, dict[str, object]]:
        """`tcp-socket.local-address`."""
        self._refuse_closed()
        if not self._bound or self._state is _State.CONNECTING:
            raise Failure("invalid-state")
        return from_native(self._sock.family, tried(self._sock.getsockname)).wit

    def remote_address(self) -> tuple[str, dict[str, object]]:
        """`tcp-socket.remote-address`. Also after a reset, when the kernel does not know it any more."""
        self._refuse_closed()
        if self._state is not _State.CONNECTED or self._peer is None:
            raise Failure("invalid-state")
        return self._peer.wit

    def is_listening(self) -> bool:
        """`tcp-socket.is-listening`."""
        return self._state is _State.LISTENING

    def address_family(self) -> str:
        """`tcp-socket.address-family`."""
        return FAMILY_NAMES[self._sock.family]

    def set_listen_backlog_size(self, value: int) -> None:
        """`tcp-socket.set-listen-backlog-size`."""
        options.refuse_zero(value)
        self._refuse_closed()
        if self._state not in {_State.DEFAULT, _State.LISTENING}:
            raise Failure("invalid-state")
        self._backlog = min(value, _LARGEST_BACKLOG)
        if self._state is _State.LISTENING:
            tried(lambda: self._sock.listen(self._backlog))

    def keep_alive_enabled(self) -> bool:
        """`tcp-socket.keep-alive-enabled`."""
        self._refuse_closed()
        return bool(tried(lambda: self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)))

    def set_keep_alive_enabled(self, value: bool) -> None:
        """`tcp-socket.set-keep-alive-enabled`."""
        self._refuse_closed()
        tried(lambda: self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, value))

    def keep_alive_idle_time(self) -> int:
        """`tcp-socket.keep-alive-idle-time`."""
        return self._tcp_option(socket.TCP_KEEPIDLE) * _SECOND

    def set_keep_alive_idle_time(self, value: int) -> None:
        """`tcp-socket.set-keep-alive-idle-time`."""
        self._set_tcp_option(socket.TCP_KEEPIDLE, value, _seconds)

    def keep_alive_interval(self) -> int:
        """`tcp-socket.keep-alive-interval`."""
        return self._tcp_option(socket.TCP_KEEPINTVL) * _SECOND

    def set_keep_alive_interval(self, value: int) -> None:
        """`tcp-socket.set-keep-alive-interval`."""
        self._set_tcp_option(socket.TCP_KEEPINTVL, value, _seconds)

    def keep_alive_count(self) -> int:
        """`tcp-socket.keep-alive-count`."""
        return self._tcp_option(socket.TCP_KEEPCNT)

    def set_keep_alive_count(self, value: int) -> None:
        """`tcp-socket.set-keep-alive-count`."""
        self._set_tcp_option(socket.TCP_KEEPCNT, value, lambda count: min(count, _MOST_KEEPALIVES))

    def hop_limit(self) -> int:
        """`tcp-socket.hop-limit`."""
        self._refuse_closed()
        return options.hop_limit(self._sock)

    def set_hop_limit(self, value: int) -> None:
        """`tcp-socket.set-hop-limit`."""
        self._refuse_closed()
        options.set_hop_limit(self._sock, value)

    def receive_buffer_size(self) -> int:
        """`tcp-socket.receive-buffer-size`."""
        self._refuse_closed()
        return options.buffer_size(self._sock, socket.SO_RCVBUF)

    def set_receive_buffer_size(self, value: int) -> None:
        """`tcp-socket.set-receive-buffer-size`."""
        self._refuse_closed()
        options.set_buffer_size(self._sock, socket.SO_RCVBUF, value)

    def send_buffer_size(self) -> int:
        """`tcp-socket.send-buffer-size`."""
        self._refuse_closed()
        return options.buffer_size(self._sock, socket.SO_SNDBUF)

    def set_send_buffer_size(self, value: int) -> None:
        """`tcp-socket.set-send-buffer-size`."""
        self._refuse_closed()
        options.set_buffer_size(self._sock, socket.SO_SNDBUF, value)

    def subscribe(self) -> Pollable:
        """`tcp-socket.subscribe`."""
        return Pollable(self._world.waiter, _Dynamic(self._interest))

    def _interest(self) -> Interest:
        if self._state is _State.CONNECTING and self._error is None:
            return _until(self._sock, select.POLLOUT)
        return _until(self._sock, select.POLLIN) if self._state is _State.LISTENING and not self._doing else READY

    def shutdown(self, how: str) -> None:
        """`tcp-socket.shutdown`."""
        if self._state is not _State.CONNECTED or self._streams is None:
            raise Failure("invalid-state")
        incoming, outgoing = self._streams
        if how in {"receive", "both"}:
            incoming.end()
        if how in {"send", "both"}:
            try:
                outgoing.end()
            except Failure:
                return  # the connection has broken, and the stream says so

    def close(self) -> None:
        """`Resource`."""
        self._world.listeners.discard(self._sock)
        self._shared.release()

    def _refuse_while_busy(self) -> None:
        if self._doing:
            raise Failure("concurrency-conflict")

    def _refuse_closed(self) -> None:
        """With what closed it: wasi-libc aborts at an invalid state, and asks for the name of a closed socket."""
        if self._state is _State.CLOSED:
            raise Failure(self._closed_by)

    def _finish(self, what: str) -> None:
        if self._doing != what:
            raise Failure("not-in-progress")
        self._doing = ""

    def _tcp_option(self, option: int) -> int:
        self._refuse_closed()
        return tried(lambda: self._sock.getsockopt(socket.IPPROTO_TCP, option))

    def _set_tcp_option(self, option: int, value: int, limited: Callable[[int], int]) -> None:
        self._refuse_closed()
        options.refuse_zero(value)
        tried(lambda: self._sock.setsockopt(socket.IPPROTO_TCP, option, limited(value)))


class _Dynamic(Source):
    """What there is to wait for depends on what the socket is doing by then."""

    def __init__(self, interest: Callable[[], Interest]) -> None:
        self._interest = interest

    def interest(self) -> Interest:
        """`Source`."""
        return self._interest()


def _until(sock: socket.socket, events: int) -> Interest:
    return Interest(((sock.fileno(), events),)) if sock.fileno() >= 0 else READY


def _is_ready(sock: socket.socket, events: int) -> bool:
    poller = select.poll()
    poller.register(sock, events)
    return bool(poller.poll(0))


def _shut(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        return  # it is not connected any more


def _seconds(nanoseconds: int) -> int:
    return min(max(nanoseconds // _SECOND, 1), _LONGEST_KEEPALIVE)


def interface(_world: World) -> Interface:
    """`wasi:sockets/tcp`."""
    return Interface(
        {
            "tcp-socket": TcpSocket,
            "network": Network,
            "pollable": Pollable,
            "input-stream": InputStream,
            "output-stream": OutputStream,
        },
        methods(
            "tcp-socket",
            TcpSocket,
            *("start-bind", "finish-bind", "start-connect", "finish-connect", "start-listen", "finish-listen"),
            *("accept", "local-address", "remote-address", "is-listening", "address-family"),
            *("set-listen-backlog-size", "keep-alive-enabled", "set-keep-alive-enabled", "keep-alive-idle-time"),
            *("set-keep-alive-idle-time", "keep-alive-interval", "set-keep-alive-interval", "keep-alive-count"),
            *("set-keep-alive-count", "hop-limit", "set-hop-limit", "receive-buffer-size"),
            *("set-receive-buffer-size", "send-buffer-size", "set-send-buffer-size", "subscribe", "shutdown"),
        ),
    )


def creation(world: World) -> Interface:
    """`wasi:sockets/tcp-create-socket`."""

    def create(family: str) -> TcpSocket:
        return TcpSocket(world, new_socket(family, socket.SOCK_STREAM))

    return Interface({"network": Network, "tcp-socket": TcpSocket}, {"create-tcp-socket": create})
