"""What runs in workers, as the handler sees it: a container's module, and further processes in it.

Not their making (`handlers.wasmtime.workers`). Invariant: all methods belong to the event loop.
"""

from __future__ import annotations

import asyncio
import os
import signal as signals
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.limit_facts import limit_facts
from cri_shim.adapters.log_sink import open_log
from cri_shim.adapters.process_cgroup import ProcessCgroups
from cri_shim.adapters.zygote import LeftChild
from cri_shim.kernel import process
from cri_shim.kernel.byte_streams import WriteEnd
from cri_shim.kernel.threads import await_in_new_thread
from cri_shim.model.errors import Internal
from cri_shim.model.handler import HandlerStats
from cri_shim.model.ids import ContainerId
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.update import change
from handlers.wasmtime.guest_spec import GuestSpec, WorkerSpec
from handlers.wasmtime.worker_channel import Channel
from handlers.wasmtime.worker_files import Files

LOST: Final = 255
"""The code of what left none."""
_STATUS_SECONDS: Final = 30.0
"""For a zygote that does not get to it on a loaded node; one that is gone is noticed at once."""


@dataclass(slots=True)
class WorkerRun:
    """`handlers.wasmtime.run.Run` of a worker."""

    container_id: ContainerId
    spec: GuestSpec
    files: Files
    process: process.Child
    context: HandlerContext
    channel: Channel
    watch: asyncio.Task[None] | None = None
    killed: bool = False
    inputs: set[WriteEnd] = field(default_factory=set)
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def worker(self) -> WorkerSpec:
        if self.spec.worker is None:
            msg = f"container {self.container_id} has no worker"
            raise Internal(msg)
        return self.spec.worker

    def stop(self, signal: int) -> None:
        """Ask for it, so that the last output gets into the log; SIGKILL is what it says."""
        if signal == signals.SIGKILL:
            self.killed = True
            self.process.kill()
        else:
            self.channel.send({"stop": signal})

    async def update(
        self, spec: GuestSpec, now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources
    ) -> None:
        worker, cgroups = self.worker, self.context.cgroups

        def apply() -> None:
            inherited = cgroups.inherited_cpuset(worker.cgroup_parent, self.container_id)
            limits = change(now, wanted, limit_facts(self.context), inherited)
            ProcessCgroups(cgroups).limit(worker.cgroup_parent, self.container_id, limits)
            if spec.worker is not None and spec.worker.oom_score_adj != worker.oom_score_adj:
                process.set_oom_score_adj(self.process.pid, spec.worker.oom_score_adj)

        await asyncio.to_thread(apply)
        self.spec = spec

    async def reopen_log(self) -> None:
        if not self.spec.log_path:
            return
        opening = asyncio.ensure_future(await_in_new_thread(partial(open_log, Path(self.spec.log_path))))
        try:
            fd = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise
        try:
            await self.channel.ask({"log": True}, "log", fd)
        finally:
            os.close(fd)

    async def tap(self, end: socket.socket) -> None:
        with end:
            async with self.asking:
                await self.channel.ask({"tap": True}, "tap", end.fileno())

    async def terminal(self) -> int:
        if not self.spec.terminal:
            return -1
        async with self.asking:
            master: int = await self.channel.ask({"terminal": True}, "terminal")
            return master

    async def end_input(self) -> None:
        self.channel.send({"end_input": True})

    def stats(self) -> HandlerStats | None:
        return None

    def info(self) -> Mapping[str, object]:
        return {"pid": self.process.pid}


class WorkerExec:
    """An `ExecSession`."""

    def __init__(self, child: LeftChild, argv: Sequence[str], terminal: int) -> None:
        self._child = child
        self.argv = tuple(argv)
        self.terminal = terminal

    @property
    def pid(self) -> int:
        """Of the process while it runs, else 0."""
        return self._child.process.pid if self._child.process.pidfd >= 0 else 0

    def end(self) -> None:
        """The container has ended, and with it its other processes."""
        self._child.process.kill()

    async def wait(self) -> int:
        """See `ExecSession`."""
        await self._child.process.wait()
        code = await known(self._child.status)
        if code is None:
            return LOST
        return 128 - code if code < 0 else code

    async def kill(self) -> None:
        """See `ExecSession`. A module starts no processes."""
        self._child.process.kill()
        await self._child.process.wait()


def _close(opening: asyncio.Future[int]) -> None:
    """What has been opened too late."""
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())


async def known(status: asyncio.Future[int] | None) -> int | None:
    """What the zygote says of its child, if it comes to that soon."""
    if status is None:
        return None
    await asyncio.wait((status,), timeout=_STATUS_SECONDS)
    return status.result() if status.done() and not status.cancelled() else None
