"""What exec and attach have in common: bytes and window sizes between a client and a process, as long as both last.

Not how a process is found or started. Invariant: each direction waits for its own receiver only, so that neither side
can hold up what the other one waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from cri_shim.model.errors import InvalidArgument
from cri_shim.model.streams import Sink, Source, TerminalSize, Wanted


def checked(wanted: Wanted) -> Wanted:
    """InvalidArgument for streams that cannot be asked for together (contract: URL and token)."""
    if wanted.tty and wanted.stderr:
        msg = "tty and stderr: a terminal has one output, ask for stdout only"
        raise InvalidArgument(msg)
    if not (wanted.stdin or wanted.stdout or wanted.stderr):
        msg = "stdin, stdout and stderr: at least one of them must be asked for"
        raise InvalidArgument(msg)
    return wanted


async def pump(source: Source, sink: Sink | None) -> None:
    """Copy to the end of `source`, or until nobody takes it any more. A sink of None takes and drops everything."""
    with contextlib.suppress(ConnectionError):
        while data := await source.read():
            if sink is not None:
                await sink.write(data)
            await asyncio.sleep(0)  # neither waits when there is always something, and always room


async def feed(source: Source, sink: Sink) -> None:
    """Copy a client's input to its end; what nobody wants any more is still taken from the client."""
    with contextlib.suppress(ConnectionError):
        while data := await source.read():
            await sink.write(data)
        await sink.close()
    while await source.read():
        pass


async def follow(sizes: AsyncIterator[TerminalSize], resize: Callable[[TerminalSize], Awaitable[None]]) -> None:
    """Give a terminal each size that its client's window gets."""
    async for size in sizes:
        await resize(size)
