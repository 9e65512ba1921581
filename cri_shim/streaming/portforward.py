"""One port-forward: each pair of streams becomes a TCP connection into the pod, all of them side by side.

Not how a pod is reached (`Connect`, a flow's). Invariant: what happens to one pair ends no other, and each direction of
a connection ends by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final, TypeVar

from cri_shim.log import get_logger
from cri_shim.model.errors import CriShimError
from cri_shim.model.streams import Connect, Connection
from cri_shim.streaming.channels import Channels, Inlet, NobodyReads, Outlet
from cri_shim.wire.mux import StreamOpened
from cri_shim.wire.portforward import BadStream, Pair, Pairing, channels

log = get_logger()

T = TypeVar("T")

MAX_TEXT: Final = 4096
"""Bytes of an error's text."""


class PortForward:
    """All pairs of one connection."""

    def __init__(self, streams: Channels, connect: Connect, pairing_seconds: float) -> None:
        self._streams = streams
        self._connect = connect
        self._pairing_seconds = pairing_seconds
        self._pairing = Pairing()
        self._ends: dict[int, tuple[Inlet, Outlet]] = {}
        self._is_numbered = False
        self._running: dict[int, asyncio.Task[None]] = {}
        """By the number of the data stream."""

    def take_opened(self) -> None:
        """The client opens the streams (SPDY)."""
        self._streams.on_open = self._opened
        self._streams.on_close = self._closed
        self._streams.start()

    def take_numbered(self, ports: tuple[int, ...]) -> None:
        """The streams are channels with fixed numbers, two for each port (WebSocket)."""
        self._is_numbered = True
        for pair in channels(ports):
            for stream in (pair.data, pair.error):
                self._ends[stream] = self._streams.take(stream)
            self._begin(pair)
        self._streams.start()

    async def drained(self) -> None:
        """Returns when no pair is left."""
        while self._running:
            await asyncio.wait(self._running.values())

    async def aclose(self) -> None:
        """Let go of all connections into the pod."""
        for task in self._running.values():
            task.cancel()
        await self.drained()

    def _opened(self, event: StreamOpened) -> None:
        try:
            pair = self._pairing.opened(event.stream, event.headers)
        except BadStream as error:
            log.info("port-forward stream refused", error=str(error))
            self._streams.refuse(event.stream)
            return
        self._ends[event.stream] = self._streams.accept(event.stream)
        if pair is None:
            asyncio.get_running_loop().call_later(self._pairing_seconds, self._give_up, event.stream)
        else:
            self._begin(pair)

    def _give_up(self, stream: int) -> None:
        """Its partner has not come."""
        if self._pairing.closed(stream):
            del self._ends[stream]
            self._streams.refuse(stream)

    def _closed(self, stream: int) -> None:
        if self._pairing.closed(stream):
            del self._ends[stream]
            self._streams.forget(stream)
        task = self._running.get(stream)
        if task is not None:
            task.cancel()

    def _begin(self, pair: Pair) -> None:
        task = asyncio.ensure_future(self._serve(pair))
        self._running[pair.data] = task
        # Not at the end of the task: one that is cancelled before its first step has none.
        task.add_done_callback(lambda _: self._forget(pair))

    def _forget(self, pair: Pair) -> None:
        del self._running[pair.data]
        # client-go resets the data when the pod's side has ended, and closes its connection when the other stream ends.
        self._ends[pair.error][1].end()
        for stream in (pair.data, pair.error):
            del self._ends[stream]
            self._streams.forget(stream)

    async def _serve(self, pair: Pair) -> None:
        """From the first connect to the last byte."""
        data, error = self._ends[pair.data], self._ends[pair.error]
        try:
            failure = await self._forward(pair, *data)
            if failure:
                await error[1].write(failure.encode(errors="replace")[:MAX_TEXT])
            await data[1].close()
            await error[1].close()
        except NobodyReads:
            pass  # the client has gone, or has reset the stream: there is nobody to tell

    async def _forward(self, pair: Pair, inlet: Inlet, outlet: Outlet) -> str:
        """What has gone wrong on the pod's side; empty when nothing has."""
        try:
            connection = await self._connect(pair.port)
        except (CriShimError, ConnectionError) as error:
            return str(error)
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(_to_pod(connection, inlet))
                directions.create_task(self._from_pod(connection, inlet, outlet))
        except* _PodBroke as errors:
            failure = f"the connection to port {pair.port} has broken: {errors.exceptions[0]}"
        except* _ClientBroke:
            failure = ""
        except* Exception as errors:
            log.error("port-forward failed", exc_info=errors)
            failure = f"the connection to port {pair.port} has failed; see the daemon's log"
        else:
            return ""
        finally:
            connection.close()
        self._streams.refuse(pair.data)
        return failure

    async def _from_pod(self, connection: Connection, inlet: Inlet, outlet: Outlet) -> None:
        while piece := await _pod_side(connection.read()):
            try:
                await outlet.write(piece)
            except NobodyReads as error:
                raise _ClientBroke from error
        await outlet.close()
        if self._is_numbered:
            inlet.discard()  # a channel has no end of its own


async def _to_pod(connection: Connection, inlet: Inlet) -> None:
    while piece := await inlet.read():
        await _pod_side(connection.write(piece))
    if not inlet.was_reset:
        await _pod_side(connection.close_write())


async def _pod_side(action: Awaitable[T]) -> T:
    try:
        return await action
    except ConnectionError as error:
        raise _PodBroke(error.strerror or "reset") from error


class _PodBroke(Exception):
    """The pod's side of a connection has broken."""


class _ClientBroke(Exception):
    """The client's side has: there is nobody to tell."""
