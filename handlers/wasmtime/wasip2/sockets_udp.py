"""`wasi:sockets/udp` and `udp-create-socket`.

Invariant: a descriptor is closed when the socket and both streams have been dropped; there is one pair of streams at a
time.
"""

from __future__ import annotations

import errno
import select
import socket
from typing import Any, Final

from cri_shim.kernel import libc
from handlers.wasmtime.wasip2 import sockets_options as options
from handlers.wasmtime.wasip2.interface import Failure, Interface, Trap, methods
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
from handlers.wasmtime.wasip2.waiter import READY, Always, Interest, Source, Waiter
from handlers.wasmtime.wasip2.world import World

_MOST: Final = 16
"""Datagrams in one call."""
_MOST_BYTES: Final = 65536
"""Bytes in one call: when there are so many, no further datagram is added."""
_LARGEST: Final = 65535


class _Channel:
    """The kernel's socket, and who holds it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.remote: Address | None = None
        self.streams = 0
        self._holders = 1

    def open(self) -> None:
        self.streams += 1
        self._holders += 1

    def close(self) -> None:
        self.streams -= 1
        self.release()

    def release(self) -> None:
        self._holders -= 1
        if not self._holders:
            self.sock.close()

    def associate(self, remote: Address | None) -> None:
        """Only datagrams from and to `remote` from now on. OSError."""
        if remote is not None:
            try:
                self.sock.connect(remote.native)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Linux keeps the address of an earlier association: it is dissolved first.
                self._dissolve()
                self.sock.connect(remote.native)
        elif self.remote is not None:
            self._dissolve()
        self.remote = remote

    def _dissolve(self) -> None:
        port = self.sock.getsockname()[1]
        libc.disconnect(self.sock.fileno())
        host, left, *more = self.sock.getsockname()
        if not left:  # Linux takes back a port that it has chosen
            self.sock.bind((host, port, *more))


class _Ready(Source):
    """Outlives the socket: whoever waits for one that is closed, waits no longer."""

    def __init__(self, sock: socket.socket, events: int) -> None:
        self._sock = sock
        self._events = events

    def interest(self) -> Interest:
        """`Source`."""
        fd = self._sock.fileno()
        return Interest(((fd, self._events),)) if fd >= 0 else READY


class IncomingDatagrams(Resource, resource=True):
    """`incoming-datagram-stream`."""

    def __init__(self, waiter: Waiter, channel: _Channel) -> None:
        self._waiter = waiter
        self._channel = channel
        channel.open()

    def receive(self, most: int) -> list[dict[str, Any]]:
        """`incoming-datagram-stream.receive`."""
        received: list[dict[str, Any]] = []
        size, sock = 0, self._channel.sock
        while len(received) < min(most, _MOST) and size < _MOST_BYTES:
            try:
                data, address = sock.recvfrom(_LARGEST)
            except BlockingIOError:
                break
            except OSError as error:
                if received:
                    break
                raise Failure(error_code(error)) from None
            source, remote = from_native(sock.family, address), self._channel.remote
            if remote is not None and (source.words, source.port) != (remote.words, remote.port):
                continue  # it had come before the socket was for one peer only
            size += len(data) + 1
            received.append({"data": data, "remote-address": source.wit})
        return received

    def subscribe(self) -> Pollable:
        """`incoming-datagram-stream.subscribe`."""
        return Pollable(self._waiter, _Ready(self._channel.sock, select.POLLIN))

    def close(self) -> None:
        """`Resource`."""
        self._channel.close()


class OutgoingDatagrams(Resource, resource=True):
    """`outgoing-datagram-stream`."""

    def __init__(self, waiter: Waiter, channel: _Channel) -> None:
        self._waiter = waiter
        self._channel = channel
        self._permit = 0
        channel.open()

    def check_send(self) -> int:
        """`outgoing-datagram-stream.check-send`."""
        self._permit = _MOST if self._waiter.look((_Ready(self._channel.sock, select.POLLOUT),)) else 0
        return self._permit

    def send(self, datagrams: list[dict[str, Any]]) -> int:
        """`outgoing-datagram-stream.send`."""
        if len(datagrams) > self._permit:
            msg = f"wasi:sockets/udp: {len(datagrams)} datagrams were sent where check-send permitted {self._permit}"
            raise Trap(msg)
        if datagrams:
            self._permit = 0
        for number, datagram in enumerate(datagrams):
            try:
                self._send(datagram)
            except BlockingIOError:
                return number
            except (OSError, Failure) as error:
                if number:
                    return number
                raise (error if isinstance(error, Failure) else Failure(error_code(error))) from None
        return len(datagrams)

    def _send(self, datagram: dict[str, Any]) -> None:
        sock, remote, wanted = self._channel.sock, self._channel.remote, datagram["remote-address"]
        target = from_wit(wanted) if wanted is not None else remote
        if target is None or not _is_peer(target, sock) or (remote is not None and target != remote):
            raise Failure("invalid-argument")
        if remote is not None:
            sock.send(datagram["data"])
        else:
            sock.sendto(datagram["data"], target.native)

    def subscribe(self) -> Pollable:
        """`outgoing-datagram-stream.subscribe`."""
        return Pollable(self._waiter, _Ready(self._channel.sock, select.POLLOUT))

    def close(self) -> None:
        """`Resource`."""
        self._channel.close()


class UdpSocket(Resource, resource=True):
    """`udp-socket`."""

    def __init__(self, world: World, sock: socket.socket) -> None:
        self._waiter = world.waiter
        self._sock = sock
        self._channel = _Channel(sock)
        self._bound = False
        self._binding = False

    def start_bind(self, _network: Network, value: tuple[str, dict[str, Any]]) -> None:
        """`udp-socket.start-bind`."""
        if self._binding:
            raise Failure("concurrency-conflict")
        address = from_wit(value)
        if self._bound:
            raise Failure("invalid-state")
        if address.family != self._sock.family or not address.is_plain:
            raise Failure("invalid-argument")
        tried(lambda: self._sock.bind(address.native))
        self._bound = self._binding = True

    def finish_bind(self) -> None:
        """`udp-socket.finish-bind`."""
        if not self._binding:
            raise Failure("not-in-progress")
        self._binding = False

    def stream(self, value: tuple[str, dict[str, Any]] | None) -> tuple[IncomingDatagrams, OutgoingDatagrams]:
        """`udp-socket.stream`."""
        if self._channel.streams:
            msg = "wasi:sockets/udp: stream was called while the streams of an earlier call are there"
            raise Trap(msg)
        if not self._bound or self._binding:
            raise Failure("invalid-state")
        remote = from_wit(value) if value is not None else None
        if remote is not None and not _is_peer(remote, self._sock):
            raise Failure("invalid-argument")
        tried(lambda: self._channel.associate(remote))
        return IncomingDatagrams(self._waiter, self._channel), OutgoingDatagrams(self._waiter, self._channel)

    def local_address(self) -> tuple[str, dict[str, Any]]:
        """`udp-socket.local-address`."""
        if not self._bound:
            raise Failure("invalid-state")
        return from_native(self._sock.family, tried(self._sock.getsockname)).wit

    def remote_address(self) -> tuple[str, dict[str, Any]]:
        """`udp-socket.remote-address`."""
        if self._channel.remote is None:
            raise Failure("invalid-state")
        return self._channel.remote.wit

    def address_family(self) -> str:
        """`udp-socket.address-family`."""
        return FAMILY_NAMES[self._sock.family]

    def unicast_hop_limit(self) -> int:
        """`udp-socket.unicast-hop-limit`."""
        return options.hop_limit(self._sock)

    def set_unicast_hop_limit(self, value: int) -> None:
        """`udp-socket.set-unicast-hop-limit`."""
        options.set_hop_limit(self._sock, value)

    def receive_buffer_size(self) -> int:
        """`udp-socket.receive-buffer-size`."""
        return options.buffer_size(self._sock, socket.SO_RCVBUF)

    def set_receive_buffer_size(self, value: int) -> None:
        """`udp-socket.set-receive-buffer-size`."""
        options.set_buffer_size(self._sock, socket.SO_RCVBUF, value)

    def send_buffer_size(self) -> int:
        """`udp-socket.send-buffer-size`."""
        return options.buffer_size(self._sock, socket.SO_SNDBUF)

    def set_send_buffer_size(self, value: int) -> None:
        """`udp-socket.set-send-buffer-size`."""
        options.set_buffer_size(self._sock, socket.SO_SNDBUF, value)

    def subscribe(self) -> Pollable:
        """`udp-socket.subscribe`. What it waits for, binding, is over at once."""
        return Pollable(self._waiter, Always())

    def close(self) -> None:
        """`Resource`."""
        self._channel.release()


def _is_peer(address: Address, sock: socket.socket) -> bool:
    return address.family == sock.family and address.is_plain and not address.is_unspecified and bool(address.port)


def interface(_world: World) -> Interface:
    """`wasi:sockets/udp`."""
    return Interface(
        {
            "udp-socket": UdpSocket,
            "incoming-datagram-stream": IncomingDatagrams,
            "outgoing-datagram-stream": OutgoingDatagrams,
            "network": Network,
            "pollable": Pollable,
        },
        {
            **methods(
                "udp-socket",
                UdpSocket,
                *("start-bind", "finish-bind", "stream", "local-address", "remote-address", "address-family"),
                *("unicast-hop-limit", "set-unicast-hop-limit", "receive-buffer-size", "set-receive-buffer-size"),
                *("send-buffer-size", "set-send-buffer-size", "subscribe"),
            ),
            **methods("incoming-datagram-stream", IncomingDatagrams, "receive", "subscribe"),
            **methods("outgoing-datagram-stream", OutgoingDatagrams, "check-send", "send", "subscribe"),
        },
    )


def creation(world: World) -> Interface:
    """`wasi:sockets/udp-create-socket`."""

    def create(family: str) -> UdpSocket:
        return UdpSocket(world, new_socket(family, socket.SOCK_DGRAM))

    return Interface({"network": Network, "udp-socket": UdpSocket}, {"create-udp-socket": create})
