"""One exec or attach: collect the client's streams, run the session between them, tell how it ended.

Not what runs (that is a flow's). Invariant: a client that is still there gets all output, then the end of each stream,
then the status, in this order, and then the connection closes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import Final

from cri_shim.log import get_logger
from cri_shim.model.errors import CriShimError, Unavailable
from cri_shim.model.streams import ClientStreams, Session, Sink, Source, TerminalSize, Wanted
from cri_shim.streaming.channels import Channels, Inlet, NobodyReads, Outlet
from cri_shim.streaming.link import Link, wait_first
from cri_shim.wire.mux import StreamOpened
from cri_shim.wire.remotecommand import (
    CHANNELS,
    STREAM_TYPE,
    Role,
    SizeParser,
    exit_report,
    failure_report,
)

log = get_logger()

_ROLES: Final = {role.value: role for role in Role}
Ends = dict[Role, tuple[Inlet, Outlet]]
SESSION_END_SECONDS: Final = 10.0
"""How long a session may take to end after it has been told to."""


class RemoteStreams:
    """What a session gets."""

    def __init__(self, link: Link, ends: Ends, wanted: Wanted) -> None:
        self._link = link
        self._ends = ends
        self._wanted = wanted

    @property
    def stdin(self) -> Source | None:
        """What the client sends."""
        return self._ends[Role.STDIN][0] if self._wanted.stdin else None

    @property
    def stdout(self) -> Sink | None:
        """What the client reads."""
        return self._ends[Role.STDOUT][1] if self._wanted.stdout else None

    @property
    def stderr(self) -> Sink | None:
        """Likewise."""
        return self._ends[Role.STDERR][1] if self._wanted.stderr else None

    async def sizes(self) -> AsyncIterator[TerminalSize]:
        """Of the terminal; what came while nobody looked is left out but for the latest."""
        if Role.RESIZE not in self._ends:
            return
        inlet, parser = self._ends[Role.RESIZE][0], SizeParser()
        while piece := await inlet.read_all():
            size = parser.feed(piece)
            if size is not None:
                yield size

    async def gone(self) -> None:
        """Returns when the client has closed the connection."""
        await asyncio.wait({self._link.gone})


async def collect(
    channels: Channels, roles: frozenset[Role], until: Iterable[Awaitable[object]], seconds: float
) -> Ends:
    """Wait until the client has opened a stream for each of the roles (SPDY); no longer than `until` and `seconds`."""
    ends: Ends = {}
    complete = asyncio.get_running_loop().create_future()

    def opened(event: StreamOpened) -> None:
        role = _ROLES.get(event.headers.get(STREAM_TYPE, ""))
        if role is None or role in ends:
            channels.refuse(event.stream)
            return
        ends[role] = channels.accept(event.stream)
        if role not in roles:
            ends[role][0].discard()
        if roles <= ends.keys() and not complete.done():
            complete.set_result(None)

    channels.on_open = opened
    channels.start()
    await wait_first(complete, *until, timeout=seconds)
    return ends


def numbered(channels: Channels, roles: frozenset[Role]) -> Ends:
    """Likewise where the streams are channels with fixed numbers (WebSocket)."""
    ends = {role: channels.take(CHANNELS[role]) for role in roles}
    channels.start()
    return ends


async def run(session: Session, streams: ClientStreams, interrupted: asyncio.Future[str]) -> tuple[int, str]:
    """The exit status, or why there is none. `interrupted` ends it before its time, and says why."""
    task = asyncio.ensure_future(session(streams))
    try:
        await wait_first(task, interrupted)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=SESSION_END_SECONDS)
            _outcome(task)
            return 0, interrupted.result()
    except asyncio.CancelledError:
        task.cancel()
        raise
    return _outcome(task)


async def finish(channels: Channels, ends: Ends, version: int, outcome: tuple[int, str]) -> None:
    """All output has been written: end the streams, tell the status, say goodbye."""
    channels.discard_input()
    code, failure = outcome
    report = failure_report(failure, version) if failure else exit_report(code, version)
    for role in (Role.STDOUT, Role.STDERR, Role.STDIN, Role.RESIZE):
        if role in ends:
            await ends[role][1].close()
    if Role.ERROR in ends:
        with contextlib.suppress(NobodyReads):
            if report:
                await ends[Role.ERROR][1].write(report)
            await ends[Role.ERROR][1].close()
    channels.say_goodbye()


def _outcome(task: asyncio.Future[int]) -> tuple[int, str]:
    if not task.done():
        log.error("session does not end", seconds=SESSION_END_SECONDS)
        return 0, ""
    if task.cancelled():
        return 0, str(Unavailable("the session has been ended"))
    error = task.exception()
    if error is None:
        return task.result(), ""
    if isinstance(error, CriShimError):
        log.info("session failed", error=str(error))
        return 0, str(error)
    if isinstance(error, NobodyReads):
        return 0, str(error)
    # A defect of ours: the trace is for whoever mends it, in the log only.
    log.error("session failed", exc_info=error)
    return 0, f"internal error: {type(error).__name__}; see the daemon's log"
