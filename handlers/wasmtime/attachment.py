"""A client at the streams of a module, wherever it runs.

Not the copying of output (`cri_shim.adapters.log_pump`). Invariant: a client that leaves closes what it has opened and
no more, unless its input was the last that the module was to get.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from cri_shim.adapters.attach import PacketAttachment
from cri_shim.kernel.byte_streams import WriteEnd
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
        """A module has no terminal."""

    async def aclose(self) -> None:
        """See `Attachment`."""
        self._packets.close()
        await self.end_input()
        if self._input is not None:
            self._input.abandon()
            self._run.inputs.discard(self._input)


async def attach(run: Run, *, stdin: bool) -> Attachment:
    """FailedPrecondition when the module has just ended."""
    entry = _open(run.spec.stdin) if stdin and run.spec.stdin else None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        await run.tap(theirs)
    except BaseException:
        ours.close()
        theirs.close()
        if entry is not None:
            entry.abandon()
        raise
    if entry is not None:
        run.inputs.add(entry)
    return WasmAttachment(run, ours, entry)


def _open(fifo: str) -> WriteEnd:
    try:
        return WriteEnd(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        msg = f"stdin: the module takes no input any more: {error.strerror}"
        raise FailedPrecondition(msg) from error
