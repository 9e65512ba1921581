"""The client's side of an exec or attach, in memory: what it sends is queued, what it gets is kept.

Not a protocol. Invariant: a client that takes nothing more holds up whoever writes, as a full connection does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from cri_shim.model.streams import PIECE_BYTES, TerminalSize


class Typed:
    """A `Source`: what the client has typed."""

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self._ended = False

    def type(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            self._pieces.put_nowait(data[start : start + PIECE_BYTES])

    def end(self) -> None:
        self._pieces.put_nowait(b"")

    async def read(self) -> bytes:
        if self._ended:
            return b""
        data = await self._pieces.get()
        self._ended = not data
        return data


@dataclass
class Shown:
    """A `Sink`: what the client has been shown."""

    data: bytearray = field(default_factory=bytearray)
    closed: bool = False
    room: asyncio.Event = field(default_factory=asyncio.Event)
    broken: bool = False

    def __post_init__(self) -> None:
        self.room.set()

    async def write(self, data: bytes) -> None:
        await self.room.wait()
        if self.broken:
            raise ConnectionResetError
        self.data += data

    async def close(self) -> None:
        self.closed = True

    async def shows(self, text: bytes, within: float = 30) -> None:
        async with asyncio.timeout(within):
            while text not in self.data:
                await asyncio.sleep(0.005)


class MemoryClient:
    """A `ClientStreams`."""

    def __init__(self, *, stdin: bool = False, stdout: bool = True, stderr: bool = False) -> None:
        self.stdin = Typed() if stdin else None
        self.stdout = Shown() if stdout else None
        self.stderr = Shown() if stderr else None
        self.window: asyncio.Queue[TerminalSize] = asyncio.Queue()
        self.joined = asyncio.Event()
        """Set when the session has begun: what is written from now on is shown."""
        self._left = asyncio.Event()

    def leave(self) -> None:
        self._left.set()
        if self.stdin is not None:
            self.stdin.end()
        for sink in (self.stdout, self.stderr):
            if sink is not None:
                sink.broken = True
                sink.room.set()

    async def sizes(self) -> AsyncIterator[TerminalSize]:
        while True:
            yield await self.window.get()

    async def gone(self) -> None:
        self.joined.set()
        await self._left.wait()

    @property
    def out(self) -> Shown:
        assert self.stdout is not None
        return self.stdout

    @property
    def err(self) -> Shown:
        assert self.stderr is not None
        return self.stderr

    @property
    def keys(self) -> Typed:
        assert self.stdin is not None
        return self.stdin
