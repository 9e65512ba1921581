"""Socket options that TCP and UDP share, with the limits that tcp.wit and udp.wit give their values."""

from __future__ import annotations

import socket
from typing import Final

from handlers.wasmtime.wasip2.interface import Failure
from handlers.wasmtime.wasip2.sockets_network import tried

_LARGEST: Final = (1 << 31) - 1
_DOUBLED: Final = 2
"""Linux keeps twice what is asked for, for its own needs, and says so (socket(7))."""


def refuse_zero(value: int) -> None:
    """Failure for a value that has to be more."""
    if value == 0:
        raise Failure("invalid-argument")


def hop_limit(sock: socket.socket) -> int:
    """Of unicast packets."""
    level, option = _hops(sock)
    return tried(lambda: sock.getsockopt(level, option))


def set_hop_limit(sock: socket.socket, value: int) -> None:
    """Likewise."""
    refuse_zero(value)
    level, option = _hops(sock)
    tried(lambda: sock.setsockopt(level, option, value))


def buffer_size(sock: socket.socket, option: int) -> int:
    """Bytes; of SO_RCVBUF or SO_SNDBUF."""
    return tried(lambda: sock.getsockopt(socket.SOL_SOCKET, option)) // _DOUBLED


def set_buffer_size(sock: socket.socket, option: int, value: int) -> None:
    """Likewise; the kernel keeps it within its limits."""
    refuse_zero(value)
    tried(lambda: sock.setsockopt(socket.SOL_SOCKET, option, min(value, _LARGEST)))


def _hops(sock: socket.socket) -> tuple[int, int]:
    if sock.family == socket.AF_INET:
        return socket.IPPROTO_IP, socket.IP_TTL
    return socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS
