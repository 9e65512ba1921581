"""The `cri-shim` command against flows in this process: a socket with the daemon's own server in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from cri_shim import cli
from cri_shim.compose import Flows
from cri_shim.rpc.edge import Gate
from cri_shim.rpc.server import Server


@dataclass(frozen=True, slots=True)
class Said:
    """What a command ended with and printed."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@dataclass(frozen=True, slots=True)
class Command:
    """Call it with the words after `cri-shim`; the socket is added."""

    socket: Path
    captured: pytest.CaptureFixture[str]

    async def __call__(self, *words: str) -> Said:
        self.captured.readouterr()
        with structlog.testing.capture_logs():  # the daemon's lines, in this process
            status = await asyncio.to_thread(cli.main, [*words, "--listen", str(self.socket)])
        printed = self.captured.readouterr()
        return Said(status, printed.out, printed.err)


@asynccontextmanager
async def served(flows: Flows, socket: Path, captured: pytest.CaptureFixture[str]) -> AsyncIterator[Command]:
    """Serves the flows on a socket for the block."""
    gate = Gate()
    server = Server(socket, flows.runtime, flows.image, gate, admin=flows.admin)
    await server.start()
    gate.open()
    try:
        yield Command(socket, captured)
    finally:
        await server.stop(1)
