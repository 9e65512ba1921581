"""`wasi:sockets/network`: error codes and addresses, for TCP, UDP and name lookup.

No sockets. Invariant: an OSError becomes the error code that network.wit names for it, and only what it does not name
is `unknown`.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from handlers.wasmtime.wasip2.descriptors import allowed_socket
from handlers.wasmtime.wasip2.interface import Failure, Interface
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.streams import IoError
from handlers.wasmtime.wasip2.world import World

_T = TypeVar("_T")

FAMILIES: Final = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
FAMILY_NAMES: Final = {family: name for name, family in FAMILIES.items()}
_IPV4: Final = struct.Struct(">4B")
_IPV6: Final = struct.Struct(">8H")
_MAPPED: Final = (0, 0, 0, 0, 0, 0xFFFF)
_BROADCAST: Final = (255, 255, 255, 255)

_CODES: Final = {
    "access-denied": (errno.EACCES, errno.EPERM),
    "address-in-use": (errno.EADDRINUSE,),
    "address-not-bindable": (errno.EADDRNOTAVAIL,),
    "concurrency-conflict": (errno.EALREADY,),
    "connection-aborted": (errno.ECONNABORTED,),
    "connection-refused": (errno.ECONNREFUSED,),
    "connection-reset": (errno.ECONNRESET,),
    "datagram-too-large": (errno.EMSGSIZE,),
    "invalid-argument": (errno.EINVAL,),
    "invalid-state": (errno.EISCONN, errno.ENOTCONN, errno.EDESTADDRREQ),
    "new-socket-limit": (errno.EMFILE, errno.ENFILE),
    "not-supported": (
        *(errno.EOPNOTSUPP, errno.ENOPROTOOPT, errno.EPFNOSUPPORT, errno.EPROTONOSUPPORT),
        *(errno.EPROTOTYPE, errno.ESOCKTNOSUPPORT, errno.EAFNOSUPPORT),
    ),
    "out-of-memory": (errno.ENOMEM, errno.ENOBUFS),
    "remote-unreachable": (errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ENETUNREACH, errno.ENONET),
    "timeout": (errno.ETIMEDOUT,),
    "would-block": (errno.EAGAIN, errno.EINTR),
}
_CODE_OF: Final = {number: code for code, numbers in _CODES.items() for number in numbers}


class Network(Resource, resource=True):
    """`network`. There is one, the pod's."""


@dataclass(frozen=True, slots=True)
class Address:
    """An IP address and a port. `words`: 4 bytes or 8 groups."""

    family: socket.AddressFamily
    words: tuple[int, ...]
    port: int
    flow: int = 0
    scope: int = 0

    @property
    def is_unspecified(self) -> bool:
        """0.0.0.0 or ::."""
        return not any(self.words)

    @property
    def is_unicast(self) -> bool:
        """Neither multicast nor broadcast."""
        if self.family == socket.AF_INET:
            return self.words[0] >> 4 != 0xE and self.words != _BROADCAST
        return self.words[0] >> 8 != 0xFF

    @property
    def is_plain(self) -> bool:
        """No IPv6 address that stands for an IPv4 one: not mapped, and not compatible, which is long deprecated."""
        if self.family == socket.AF_INET:
            return True
        high, low = self.words[:6], self.words[6:]
        return high != _MAPPED and not (not any(high) and low not in {(0, 0), (0, 1)})

    @property
    def native(self) -> Any:
        """As Python's sockets take it."""
        text = socket.inet_ntop(self.family, (_IPV4 if self.family == socket.AF_INET else _IPV6).pack(*self.words))
        return (text, self.port) if self.family == socket.AF_INET else (text, self.port, self.flow, self.scope)

    @property
    def wit(self) -> tuple[str, dict[str, Any]]:
        """`ip-socket-address`."""
        if self.family == socket.AF_INET:
            return "ipv4", {"port": self.port, "address": self.words}
        return "ipv6", {"port": self.port, "flow-info": self.flow, "address": self.words, "scope-id": self.scope}


def from_wit(value: tuple[str, dict[str, Any]]) -> Address:
    """Of an `ip-socket-address`."""
    name, record = value
    flow, scope = record.get("flow-info", 0), record.get("scope-id", 0)
    return Address(FAMILIES[name], record["address"], record["port"], flow, scope)


def from_native(family: int, value: Any) -> Address:
    """Of what Python's sockets give."""
    packed = socket.inet_pton(family, value[0].partition("%")[0])
    if family == socket.AF_INET:
        return Address(socket.AF_INET, _IPV4.unpack(packed), value[1])
    return Address(socket.AF_INET6, _IPV6.unpack(packed), value[1], value[2], value[3])


def error_code(error: OSError) -> str:
    """`error-code`."""
    return _CODE_OF.get(error.errno or 0, "unknown")


def tried(call: Callable[[], _T]) -> _T:
    """What a system call gives. Failure with the code of its error."""
    try:
        return call()
    except OSError as error:
        raise Failure(error_code(error)) from None


def new_socket(family: str, kind: int) -> socket.socket:
    """One that does not block; of IPv6 it is for IPv6 alone, as tcp.wit and udp.wit say. Failure."""
    sock = tried(lambda: allowed_socket(socket.socket(FAMILIES[family], kind | socket.SOCK_NONBLOCK)))
    if family == "ipv6":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return sock


def network(_world: World) -> Interface:
    """`wasi:sockets/network`."""

    def network_error_code(error: IoError) -> str | None:
        return error_code(error.cause) if isinstance(error.cause, OSError) else None

    return Interface({"network": Network, "error": IoError}, {"network-error-code": network_error_code})


def instance_network(_world: World) -> Interface:
    """`wasi:sockets/instance-network`."""
    return Interface({"network": Network}, {"instance-network": Network})
