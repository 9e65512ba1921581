"""Exec: a further process in a running container, its streams at a client's.

Not ExecSync, which keeps the output. Invariant: when a session is over, however it ends, neither the process nor
anything that descends from it is left running for a client that has gone.

    client ──input──▶ pipe or terminal ──▶ process ──▶ pipes or terminal ──output──▶ client
                                             └─ ends: what it wrote is delivered, then its status
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Store
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.lookup import running_container
from cri_shim.flows.session import checked, feed, follow, pump
from cri_shim.kernel import tty
from cri_shim.kernel.byte_streams import ReadEnd, TerminalInput, WriteEnd
from cri_shim.model.errors import CannotExecute, InvalidArgument
from cri_shim.model.handler import ExecRequest, ExecSession, Handler, TerminalRequest
from cri_shim.model.ids import ContainerId
from cri_shim.model.streams import ClientStreams, Sink, StreamingServer, TerminalSize, Wanted
from cri_shim.pb import api_pb2 as pb

DRAIN_SECONDS = 1.0
"""How long a background child that keeps the output open can hold a session after the process's own exit."""
_SIZE_SECONDS = 0.1
"""How long a terminal waits for its first size: programs look at it when they start."""
_KILLED = 137


@dataclass(slots=True)
class Exec:
    """The flow."""

    store: Store
    handlers: Handlers
    server: StreamingServer

    async def __call__(self, request: pb.ExecRequest) -> pb.ExecResponse:
        """Give out a URL; the process starts when a client comes to it."""
        container = running_container(self.store, request.container_id)
        args = command(request.cmd)
        wanted = checked(Wanted(request.stdin, request.stdout, request.stderr, request.tty))
        handler = self.handlers.get(container.handler)
        session = functools.partial(serve, Command(handler, container.id, args, wanted.tty))
        return pb.ExecResponse(url=self.server.exec_url(wanted, session))


def command(words: Sequence[str]) -> tuple[str, ...]:
    """What to execute; InvalidArgument when it is nothing."""
    if not words or not words[0]:
        msg = "cmd is empty"
        raise InvalidArgument(msg)
    return tuple(words)


@dataclass(frozen=True, slots=True)
class Command:
    """What a client runs, and where."""

    handler: Handler
    container_id: ContainerId
    args: tuple[str, ...]
    tty: bool


@dataclass(frozen=True, slots=True)
class _Process:
    """A process that runs, and our ends of its streams."""

    session: ExecSession
    outputs: Sequence[tuple[ReadEnd, Sink | None]]
    input: Sink | None


async def serve(what: Command, client: ClientStreams) -> int:
    """One session, from the start of the process to its end: its exit status."""
    window = _Window()
    leaving = asyncio.ensure_future(client.gone())
    resizing = asyncio.ensure_future(follow(client.sizes(), window.resize))
    with ExitStack() as opened:
        opened.callback(leaving.cancel)
        opened.callback(resizing.cancel)
        try:
            if what.tty:
                process = await _start_with_terminal(what, client, window, opened)
            else:
                process = await _start_with_pipes(what, client, opened)
        except CannotExecute as error:
            await _say(client, f"{error}\n")
            return error.exit_status
        return await _converse(process, client, leaving)


async def _say(client: ClientStreams, text: str) -> None:
    """As a shell does it that cannot execute a command."""
    sink = client.stderr or client.stdout
    if sink is not None:
        with contextlib.suppress(ConnectionError):
            await sink.write(text.encode())


async def _start_with_pipes(what: Command, client: ClientStreams, opened: ExitStack) -> _Process:
    with ExitStack() as of_child:
        stdout, out = _pipe(opened, of_child)
        stderr, err = _pipe(opened, of_child)
        stdin, into = _input_pipe(opened, of_child) if client.stdin is not None else (None, None)
        session = await what.handler.exec(what.container_id, ExecRequest(what.args, stdin, out, err))
    return _Process(session, [(stdout, client.stdout), (stderr, client.stderr)], into)


async def _start_with_terminal(what: Command, client: ClientStreams, window: _Window, opened: ExitStack) -> _Process:
    await window.known()
    session = await what.handler.exec(what.container_id, TerminalRequest(what.args, window.size))
    output = ReadEnd(session.terminal)
    opened.callback(output.close)
    window.of(session.terminal)
    opened.callback(window.of, -1)
    return _Process(session, [(output, client.stdout)], TerminalInput(session.terminal))


def _pipe(opened: ExitStack, of_child: ExitStack) -> tuple[ReadEnd, int]:
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    of_child.callback(os.close, theirs)
    end = ReadEnd(ours)
    opened.callback(end.close)
    return end, theirs


def _input_pipe(opened: ExitStack, of_child: ExitStack) -> tuple[int, WriteEnd]:
    theirs, ours = os.pipe2(os.O_CLOEXEC)
    of_child.callback(os.close, theirs)
    end = WriteEnd(ours)
    opened.callback(end.abandon)
    return theirs, end


async def _converse(process: _Process, client: ClientStreams, leaving: asyncio.Future[None]) -> int:
    """Until the process has ended and its output is delivered, or the client has left."""
    try:
        async with asyncio.TaskGroup() as group:
            exited = group.create_task(process.session.wait())
            outputs = [group.create_task(pump(end, sink)) for end, sink in process.outputs]
            tasks: list[asyncio.Task[Any]] = [exited, *outputs]
            if client.stdin is not None and process.input is not None:
                tasks.append(group.create_task(feed(client.stdin, process.input)))
            await _first(exited, leaving)
            if exited.done():
                await _deliver(process, outputs, leaving)
            for task in tasks:
                task.cancel()
        return _KILLED if exited.cancelled() else exited.result()
    finally:
        if exited.cancelled():
            await to_the_end(process.session.kill())


async def _deliver(process: _Process, outputs: Sequence[asyncio.Task[None]], leaving: asyncio.Future[None]) -> None:
    """Wait until the client has taken all that was written until a moment after the exit, however slow it is."""
    delivered = asyncio.gather(*outputs)
    await _first(delivered, leaving, timeout=DRAIN_SECONDS)
    for end, _ in process.outputs:
        end.finish()
    await _first(delivered, leaving)


async def _first(*awaited: asyncio.Future[Any], timeout: float | None = None) -> None:
    await asyncio.wait(awaited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


class _Window:
    """The client's, as large as was said last; and the terminal that follows it, once there is one."""

    def __init__(self) -> None:
        self.size: TerminalSize | None = None
        self._known = asyncio.Event()
        self._master = -1

    async def resize(self, size: TerminalSize) -> None:
        self.size = size
        self._known.set()
        self.of(self._master)

    async def known(self) -> None:
        """Wait for the first size, for a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SIZE_SECONDS):
                await self._known.wait()

    def of(self, master: int) -> None:
        """The terminal is this one from now on; -1 = none."""
        self._master = master
        if master >= 0 and self.size is not None:
            tty.set_size(master, self.size)
