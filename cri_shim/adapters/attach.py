"""Clients at the streams of a container under conmon: its attach socket and its control FIFO (contract: conmon facts).

    packets from conmon: one byte that says which stream, then what was written to it; packets to it are input

Not the clients' protocols. Invariant: coming and going changes nothing for the container, except that the first client
with input of a `stdin_once` container ends that input when it leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Final

from cri_shim.adapters.monitor import Launch
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import Piece
from cri_shim.model.streams import PIECE_BYTES, TerminalSize
from cri_shim.wire import conmon

_CONNECT_SECONDS: Final = 5.0


class PacketAttachment:
    """An `Attachment` whose output comes over a socket in conmon's form."""

    def __init__(self, packets: socket.socket) -> None:
        self._packets = packets
        packets.setblocking(False)

    async def read(self) -> Piece | None:
        """See `Attachment`."""
        try:
            packet = await asyncio.get_running_loop().sock_recv(self._packets, 1 + PIECE_BYTES)
        except ConnectionError:
            return None
        return Piece(packet[1:], packet[0] == conmon.ATTACH_ERROR) if packet else None


class ConmonAttachment(PacketAttachment):
    """One client of one conmon."""

    def __init__(self, launch: Launch, packets: socket.socket, kept: list[socket.socket] | None) -> None:
        """`kept` is given when leaving must not end the container's input: the connection goes there then."""
        super().__init__(packets)
        self._control = launch.files.control
        self._once = launch.stdin_once
        self._tty = launch.tty
        self._kept = kept

    async def write(self, data: bytes) -> None:
        """See `Attachment`. A packet is all or nothing."""
        await asyncio.get_running_loop().sock_sendall(self._packets, data)

    async def end_input(self) -> None:
        """See `Attachment`."""
        if self._once:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                self._packets.shutdown(socket.SHUT_WR)

    async def resize(self, size: TerminalSize) -> None:
        """See `Attachment`."""
        if self._tty:
            await asyncio.to_thread(_tell, self._control, conmon.resize(size))

    async def aclose(self) -> None:
        """See `Attachment`."""
        if self._kept is not None and self._packets.fileno() >= 0:
            with contextlib.suppress(OSError):
                self._packets.shutdown(socket.SHUT_RD)  # conmon writes no more to it, and waits for no reader
            self._kept.append(self._packets.dup())
        self._packets.close()


class Attachments:
    """Those of one container."""

    def __init__(self) -> None:
        self._kept: list[socket.socket] = []

    async def attach(self, launch: Launch, *, stdin: bool) -> ConmonAttachment:
        """Connect; `stdin` when the client has input. FailedPrecondition when conmon does not listen any more."""
        packets = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            await asyncio.to_thread(_connect, packets, launch.files.attach)
        except OSError as error:
            packets.close()
            msg = f"the container's monitor does not listen: {error.strerror}"
            raise FailedPrecondition(msg) from error
        return ConmonAttachment(launch, packets, self._kept if launch.stdin_once and not stdin else None)

    def close(self) -> None:
        """The container has ended."""
        while self._kept:
            self._kept.pop().close()


def _connect(packets: socket.socket, path: Path) -> None:
    # By the directory's descriptor: a path may be longer than a socket's address.
    packets.settimeout(_CONNECT_SECONDS)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        packets.connect(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def _tell(control: Path, message: bytes) -> None:
    with contextlib.suppress(OSError):  # conmon has just ended
        fd = os.open(control, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(fd, message)
        finally:
            os.close(fd)
