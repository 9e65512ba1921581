"""TCP connections to the loopback of a pod, from the daemon's loop.

Not how they are carried to a client. Invariant: a socket stays in the namespace that it was made in, and only a
throw-away thread ever enters one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Final

from cri_shim.kernel import namespaces
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.streams import PIECE_BYTES

_CONNECT_SECONDS: Final = 10.0
_ADDRESSES: Final = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


class PodConnection:
    """A `Connection`."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._loop = asyncio.get_running_loop()

    async def read(self) -> bytes:
        """See `Connection`."""
        return await self._loop.sock_recv(self._peer, PIECE_BYTES)

    async def write(self, data: bytes) -> None:
        """See `Connection`."""
        await self._loop.sock_sendall(self._peer, data)

    async def close_write(self) -> None:
        """See `Connection`."""
        with contextlib.suppress(OSError):  # reset meanwhile: the reader is told
            self._peer.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See `Connection`."""
        self._peer.close()


async def connect(netns: Path | None, port: int) -> PodConnection:
    """To 127.0.0.1, else to ::1. `netns` of None is the node's network. FailedPrecondition says why there is none."""
    sockets = _sockets() if netns is None else await namespaces.await_in_netns(netns, _sockets)
    errors: list[str] = []
    with contextlib.ExitStack() as opened:
        for attempt in sockets:
            opened.callback(attempt.close)
        for attempt, (_, address) in zip(sockets, _ADDRESSES, strict=False):
            error = await _try(attempt, address, port)
            if not error:
                return PodConnection(attempt.dup())
            errors.append(f"{address}: {error}")
    msg = f"cannot connect to port {port} of the pod: {', '.join(errors)}"
    raise FailedPrecondition(msg)


async def _try(attempt: socket.socket, address: str, port: int) -> str:
    """Connect; what has failed, empty when nothing has."""
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            await asyncio.get_running_loop().sock_connect(attempt, (address, port))
    except TimeoutError:
        return f"no answer within {_CONNECT_SECONDS:g} s"
    except OSError as error:
        return os.strerror(error.errno or 0).lower()
    return ""


def _sockets() -> list[socket.socket]:
    """One for each of the addresses, IPv4 only on a node without IPv6."""
    made: list[socket.socket] = []
    try:
        for family, _ in _ADDRESSES:
            if family == socket.AF_INET or socket.has_ipv6:
                made.append(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
    except OSError:
        if not made:
            raise
    return made
