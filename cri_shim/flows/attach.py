"""Attach: a client at the streams of a container's first process.

Not a process: it goes on when the client leaves. Invariant: a client that does not read holds up the container's
output for a bounded time, as its other clients and its log wait with it.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass

from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Store
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.lookup import running_container
from cri_shim.flows.session import checked, feed, follow
from cri_shim.model.container import ContainerRecord
from cri_shim.model.errors import FailedPrecondition, WrongState
from cri_shim.model.handler import Attachment, Handler
from cri_shim.model.ids import SHORT, ContainerId
from cri_shim.model.streams import ClientStreams, Sink, StreamingServer, Wanted
from cri_shim.pb import api_pb2 as pb

STALL_SECONDS = 30.0
"""How long a client may take for one piece of output."""


@dataclass(slots=True)
class Attach:
    """The flow."""

    store: Store
    handlers: Handlers
    server: StreamingServer

    async def __call__(self, request: pb.AttachRequest) -> pb.AttachResponse:
        """Give out a URL; nothing of the container's output is kept until a client comes to it."""
        container = running_container(self.store, request.container_id)
        wanted = checked(Wanted(request.stdin, request.stdout, request.stderr, request.tty))
        _check_container(container, wanted)
        handler = self.handlers.get(container.handler)
        session = functools.partial(serve, handler, container.id)
        return pb.AttachResponse(url=self.server.attach_url(wanted, session, lambda: self._check(container.id)))

    def _check(self, container_id: ContainerId) -> None:
        running_container(self.store, container_id)


def _check_container(container: ContainerRecord, wanted: Wanted) -> None:
    config = pb.ContainerConfig.FromString(container.config)
    for field, asked, given in (("stdin", wanted.stdin, config.stdin), ("tty", wanted.tty, config.tty)):
        if asked and not given:
            msg = f"{field}: container {container.id[:SHORT]} was made without it"
            raise WrongState(msg)


async def serve(handler: Handler, container_id: ContainerId, client: ClientStreams) -> int:
    """One session, until the container ends or the client leaves."""
    attachment = await handler.attach(container_id, stdin=client.stdin is not None)
    leaving = asyncio.ensure_future(client.gone())
    try:
        async with asyncio.TaskGroup() as group:
            output = group.create_task(_show(attachment, client))
            tasks = [output, group.create_task(follow(client.sizes(), attachment.resize))]
            if client.stdin is not None:
                tasks.append(group.create_task(feed(client.stdin, _Input(attachment))))
            await asyncio.wait([output, leaving], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
    except* FailedPrecondition as errors:
        raise errors.exceptions[0] from None
    finally:
        leaving.cancel()
        await to_the_end(attachment.aclose())
    return 0


async def _show(attachment: Attachment, client: ClientStreams) -> None:
    """Copy the output until the container ends, or the client takes no more."""
    while (piece := await attachment.read()) is not None:
        sink = client.stderr if piece.is_error else client.stdout
        if sink is not None and not await _taken(sink, piece.data):
            return


async def _taken(sink: Sink, data: bytes) -> bool:
    """Whether there is still somebody. FailedPrecondition when the client takes too long."""
    try:
        async with asyncio.timeout(STALL_SECONDS):
            await sink.write(data)
    except ConnectionError:
        return False
    except TimeoutError:
        msg = f"the client has read nothing for {STALL_SECONDS:g} s and holds up the container's output"
        raise FailedPrecondition(msg, hint="attach again") from None
    return True


@dataclass(frozen=True, slots=True)
class _Input:
    """An attachment's input as a `Sink`."""

    attachment: Attachment

    async def write(self, data: bytes) -> None:
        await self.attachment.write(data)

    async def close(self) -> None:
        await self.attachment.end_input()
