"""A client at the streams of a module, wherever it runs.

Not the copying of output (`cri_shim.adapters.log_pump`). Invariant: a client that leaves closes what it has opened and
no more, unless its input was the last that the module was to get.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from cri_shim.adapters.attach import PacketAttachment
from cri_shim.kernel import tty
from cri_shim.kernel.byte_streams import TerminalInput, WriteEnd
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import Attachment
from cri_shim.model.streams import TerminalSize
from handlers.wasmtime.run import Run


class WasmAttachment(PacketAttachment):
    """An `Attachment`."""

    def __init__(self, run: Run, packets: socket.socket, entry: WriteEnd | None) -> None:
        super().__init__(packets)
        self._run = run
        self._input = entry

    async def write(self, data: bytes) -> None:
        """See `Attachment`."""
        if self._input is None:
            raise BrokenPipeError
        await self._input.write(data)

    async def end_input(self) -> None:
        """See `Attachment`."""
        if self._input is not None and self._run.spec.stdin_once:
            self._input.abandon()
            await asyncio.to_thread(Path(self._run.spec.stdin).unlink, missing_ok=True)  # nobody comes after it
            await self._run.end_input()

    async def resize(self, size: TerminalSize) -> None:
        """Nothing: it has no terminal."""

    async def aclose(self) -> None:
        """See `Attachment`."""
        self._packets.close()
        await self.end_input()
        if self._input is not None:
            self._input.abandon()
            self._run.inputs.discard(self._input)


class TerminalAttachment(PacketAttachment):
    """An `Attachment` to a terminal, of whose master end it is an owner."""

    def __init__(self, packets: socket.socket, master: int, *, once: bool) -> None:
        super().__init__(packets)
        self._master = master
        self._once = once
        os.set_blocking(master, False)
        self._keys = TerminalInput(master)

    async def write(self, data: bytes) -> None:
        """See `Attachment`."""
        await self._keys.write(data)

    async def end_input(self) -> None:
        """See `Attachment`. A terminal is told by a character."""
        if self._once:
            self._once = False
            with contextlib.suppress(ConnectionError):
                await self._keys.close()

    async def resize(self, size: TerminalSize) -> None:
        """See `Attachment`."""
        tty.set_size(self._master, size)

    async def aclose(self) -> None:
        """See `Attachment`."""
        self._packets.close()
        master, self._master = self._master, -1
        if master >= 0:
            os.close(master)


async def attach(run: Run, *, stdin: bool) -> Attachment:
    """FailedPrecondition when the module has just ended."""
    master = await run.terminal()
    if master >= 0:
        try:
            return TerminalAttachment(await _tapped(run), master, once=run.spec.stdin_once)
        except BaseException:
            os.close(master)
            raise
    entry = _open(run.spec.stdin) if stdin and run.spec.stdin else None
    try:
        ours = await _tapped(run)
    except BaseException:
        if entry is not None:
            entry.abandon()
        raise
    if entry is not None:
        run.inputs.add(entry)
    return WasmAttachment(run, ours, entry)


async def _tapped(run: Run) -> socket.socket:
    """Our end of a copy of the output."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        await run.tap(theirs)
    except BaseException:
        ours.close()
        theirs.close()
        raise
    return ours


def _open(fifo: str) -> WriteEnd:
    try:
        return WriteEnd(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        msg = f"stdin: the module takes no input any more: {error.strerror}"
        raise FailedPrecondition(msg) from error
