"""ExecSync: a command in a running container, its output in memory, within limits and a deadline.

Not a stream (Exec). Invariant: when it returns, nothing of the command's is left that the deadline was meant to end.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field

from cri_shim.adapters.store import Store
from cri_shim.flows.exec import DRAIN_SECONDS, command
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.lookup import running_container
from cri_shim.model.errors import DeadlineExceeded, InvalidArgument
from cri_shim.model.handler import ExecRequest, ExecSession
from cri_shim.pb import api_pb2 as pb

OUTPUT_BYTES = 16 << 20
"""Per stream; what is beyond is read and dropped while the command goes on (contract: ExecSync)."""
RESPONSE_BYTES = 15 << 20
"""Both streams together: the kubelet's client takes no message above 16 MiB."""
_CHUNK = 1 << 16


@dataclass(slots=True)
class ExecSync:
    """The flow."""

    store: Store
    handlers: Handlers

    async def __call__(self, request: pb.ExecSyncRequest) -> pb.ExecSyncResponse:
        """Run a command; a status other than 0 is an answer, not an error."""
        container = running_container(self.store, request.container_id)
        args = command(request.cmd)
        if request.timeout < 0:
            msg = f"timeout {request.timeout} is negative"
            raise InvalidArgument(msg)
        handler = self.handlers.get(container.handler)
        stdout, stderr = _Sink(), _Sink()
        try:
            session = await handler.exec(
                container.id,
                ExecRequest(args, stdin=None, stdout=stdout.write_end, stderr=stderr.write_end),
            )
            stdout.close_write_end()
            stderr.close_write_end()
            code = await _finish(session, request.timeout or None, args[0])
            await _drain(stdout, stderr)
        finally:
            stdout.close()
            stderr.close()
        out = bytes(stdout.data[:RESPONSE_BYTES])
        return pb.ExecSyncResponse(stdout=out, stderr=bytes(stderr.data[: RESPONSE_BYTES - len(out)]), exit_code=code)


async def _finish(session: ExecSession, timeout: float | None, command: str) -> int:
    try:
        async with asyncio.timeout(timeout):
            return await session.wait()
    except TimeoutError:
        await asyncio.shield(session.kill())
        msg = f"command {command[:200]!r} did not end within {timeout:g} s and was killed"
        raise DeadlineExceeded(msg) from None
    except asyncio.CancelledError:
        await asyncio.shield(session.kill())
        raise


async def _drain(*sinks: _Sink) -> None:
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            for sink in sinks:
                await sink.ended.wait()
    except TimeoutError:
        return


@dataclass(slots=True)
class _Sink:
    """A pipe that is read to its end by the loop and kept up to a limit."""

    read_end: int = -1
    write_end: int = -1
    data: bytearray = field(default_factory=bytearray)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read_end, False)
        asyncio.get_running_loop().add_reader(self.read_end, self._readable)

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def close(self) -> None:
        self.close_write_end()
        if self.read_end >= 0:
            asyncio.get_running_loop().remove_reader(self.read_end)
            os.close(self.read_end)
            self.read_end = -1

    def _readable(self) -> None:
        try:
            chunk = os.read(self.read_end, _CHUNK)
        except BlockingIOError:
            return
        self.data += chunk[: max(0, OUTPUT_BYTES - len(self.data))]
        if not chunk:
            asyncio.get_running_loop().remove_reader(self.read_end)
            self.ended.set()
