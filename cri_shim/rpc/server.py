"""The gRPC server on the CRI socket: the two services of the CRI, and one of our own for the `cri-shim` command.

Not what the RPCs do. Invariant: only root and the group of the socket can ever connect, and a socket file that somebody
still listens on is never replaced.
"""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

import grpc.aio

from cri_shim.model.errors import FailedPrecondition
from cri_shim.pb import admin_pb2
from cri_shim.pb import api_pb2 as pb
from cri_shim.rpc.edge import Flow, Gate, StreamFlow, service_handler

MESSAGE_BYTES = 32 << 20
"""ExecSync may answer 16 MiB; gRPC's own limit is 4."""
SOCKET_MODE = 0o660


Table = Mapping[str, Flow | StreamFlow]
"""The flows of a service, by the name of the RPC."""


class Server:
    """All services on one socket."""

    def __init__(self, path: Path, runtime: Table, image: Table, gate: Gate, *, admin: Table | None = None) -> None:
        self._path = path
        self._gate = gate
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_send_message_length", MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ]
        )
        cri = pb.DESCRIPTOR.services_by_name
        self._server.add_generic_rpc_handlers(
            (
                service_handler(cri["RuntimeService"], runtime, gate),
                service_handler(cri["ImageService"], image, gate),
                service_handler(admin_pb2.DESCRIPTOR.services_by_name["Admin"], admin or {}, gate),
            )
        )

    async def start(self) -> None:
        """Listen. Raises FailedPrecondition when the path cannot be used."""
        await asyncio.to_thread(_clear, self._path)
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
            await self._server.start()
        except RuntimeError as error:
            msg = f"cannot listen on {self._path}: {error}"
            raise FailedPrecondition(msg) from error
        # Until here the umask (022, set at start) has kept everybody but the owner out.
        self._path.chmod(SOCKET_MODE)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give those under way `grace` seconds, remove the socket."""
        self._gate.close()
        await self._server.stop(grace)
        self._path.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Make the directory, and remove a socket that a dead daemon has left."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not stat.S_ISSOCK(path.lstat().st_mode):
            msg = f"cannot listen on {path}: it exists and is no socket"
            raise FailedPrecondition(msg)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    msg = f"cannot listen on {path}: another process serves it"
    raise FailedPrecondition(msg, hint="stop it, or set another --listen")
