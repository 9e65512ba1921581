"""What passes between a client far away and something on this node: the ends of exec, attach and port-forward.

Not a protocol and not a process: `cri_shim.streaming` speaks SPDY and WebSocket and offers these ends, flows and
handlers use them. Invariant: nothing here buffers without limit; who writes waits until there is room.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

PIECE_BYTES = 32 << 10
"""No piece that is read or written at once is longer."""


class Source(Protocol):
    """Bytes that arrive."""

    async def read(self) -> bytes:
        """The next piece; empty at the end, and when the client has gone."""
        ...


class Sink(Protocol):
    """Bytes that leave."""

    async def write(self, data: bytes) -> None:
        """Send a piece; returns when there is room for the next, and others have had their turn.

        ConnectionError when the client has gone.
        """
        ...

    async def close(self) -> None:
        """No more follows (half close). A second call, and one after the client has gone, do nothing."""
        ...


@dataclass(frozen=True, slots=True)
class TerminalSize:
    """Of a client's terminal, in characters; both at least 1."""

    width: int
    height: int


class ClientStreams(Protocol):
    """The client's side of one exec or attach. None = not asked for."""

    @property
    def stdin(self) -> Source | None: ...

    @property
    def stdout(self) -> Sink | None: ...

    @property
    def stderr(self) -> Sink | None: ...

    def sizes(self) -> AsyncIterator[TerminalSize]:
        """Of the terminal, the latest only; ends with the session. Nothing comes without a terminal."""
        ...

    async def gone(self) -> None:
        """Returns when the client has closed the connection."""
        ...


class Connection(Protocol):
    """One TCP connection to a port in a pod."""

    async def read(self) -> bytes:
        """The next piece; empty at the end. ConnectionError when it was reset."""
        ...

    async def write(self, data: bytes) -> None:
        """Send a piece; returns when there is room for the next. ConnectionError when it was reset."""
        ...

    async def close_write(self) -> None:
        """No more follows (half close)."""
        ...

    def close(self) -> None:
        """Let go of it at once. A second call does nothing."""
        ...


Session = Callable[[ClientStreams], Awaitable[int]]
"""An exec or attach: runs until the process (exec) or its output (attach) ends; the exit status, for attach 0.

It does not close the sinks: who called it does. A CriShimError becomes the status that the client sees. The client's
leave is for the session to notice (`gone`)."""

Connect = Callable[[int], Awaitable[Connection]]
"""Connect to a port of a pod; a CriShimError's text is what the client sees."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The streams that a client asks for in ExecRequest and AttachRequest."""

    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool


class StreamingServer(Protocol):
    """Gives out URLs, each good for one use within a minute. ResourceExhausted when too many wait for their use."""

    def exec_url(self, wanted: Wanted, session: Session) -> str: ...

    def attach_url(self, wanted: Wanted, session: Session, check: Callable[[], None]) -> str:
        """`check` raises a CriShimError that the client gets in place of streams: the container may have ended."""
        ...

    def port_forward_url(self, ports: tuple[int, ...], connect: Connect, check: Callable[[], None]) -> str:
        """`ports`: those of the request, for the WebSocket form that numbers its channels by them."""
        ...
