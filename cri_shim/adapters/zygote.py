"""The daemon's side of the zygote: start it, ask it for children, wait for their results.

Not a pool: every task gets a fresh child, and how many run at once is the caller's to limit. Invariant: when `run`
returns, in whatever way, its child has ended, so what the child worked on can be removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cri_shim
from cri_shim.adapters.shielded import to_the_end
from cri_shim.kernel import process
from cri_shim.model.errors import CriShimError, DeadlineExceeded, Internal, ResourceExhausted

_PROGRAM: Final = Path(cri_shim.__file__).parent / "zygote" / "__main__.py"
_MESSAGE: Final = 4096
_MAX_DESCRIPTORS: Final = 250  # SCM_MAX_FD, less our own three
_EXIT_WAIT: Final = 30.0
"""Seconds between a child's last byte and its exit status."""


class ZygoteLostError(CriShimError):
    """The zygote died before it had forked; the same call again starts a new one."""


class TaskError(Internal):
    """A task ended with an exception. `type` is the exception's class name, `errno` is None but for an OSError."""

    def __init__(self, task: str, failure: Mapping[str, Any]) -> None:
        self.type = str(failure.get("type"))
        self.text = str(failure.get("text"))
        self.errno: int | None = failure.get("errno")
        super().__init__(f"{task} failed: {self.type}: {self.text} (at {failure.get('where')})")


class TaskEndedError(Internal):
    """A child ended without a result. `signal` is what killed it, None when it exited or nobody knows."""

    def __init__(self, task: str, status: int | None) -> None:
        self.signal = signal.Signals(-status) if status is not None and status < 0 else None
        if self.signal is not None:
            ending = f"was killed by {self.signal.name}"
        else:
            ending = "ended" if status is None else f"exited with status {status}"
        super().__init__(f"{task} {ending} without a result", hint="look for the OOM killer in the kernel log")


@dataclass(frozen=True, slots=True)
class _Child:
    """A child of the zygote; `status` follows when the zygote has reaped it."""

    process: process.Child
    status: asyncio.Future[int]


@dataclass(frozen=True, slots=True)
class LeftChild:
    """A child that goes on by itself. `status`: as subprocess has it, as long as there is this zygote."""

    process: process.Child
    status: asyncio.Future[int]


class Zygote:
    """Tasks are functions `module:function` that take `(arguments, descriptors)` and return a JSON object.

    They run in a forked child that has nothing of the daemon but the descriptors given, and its credentials.
    `held` descriptors stay open in every child until it ends; `search_path` is what children import from; `preload` are
    modules that the zygote imports itself, for all its children, or functions `module:function` that it calls: no
    thread may be left of it.
    """

    def __init__(
        self, held: Sequence[int] = (), search_path: Sequence[str] | None = None, preload: Sequence[str] = ()
    ) -> None:
        self._held = tuple(held)
        self._preload = tuple(preload)
        self.search_path = tuple(_own_search_path() if search_path is None else search_path)
        self._starting = asyncio.Lock()
        self._channel: socket.socket | None = None
        self._process: process.Child | None = None
        self._forks: deque[asyncio.Future[_Child]] = deque()
        self._children: dict[int, asyncio.Future[int]] = {}

    @property
    def pid(self) -> int | None:
        """Of the running zygote, for accounting."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the process unless it runs. `run` does that too; this only does it early."""
        async with self._starting:
            if self._channel is None:
                await to_the_end(self._start())

    async def run(
        self, task: str, arguments: Mapping[str, Any], fds: Sequence[int] = (), *, timeout: float | None
    ) -> dict[str, Any]:
        """Run `task` in a child and return its result.

        TaskError for an exception of the task, DeadlineExceeded after `timeout` seconds (None: never), TaskEndedError
        when the child was killed by somebody else, ZygoteLostError. The child is killed then, and when the caller is
        cancelled.
        """
        await self.start()
        with contextlib.ExitStack() as ours:
            result, theirs = _pipe(ours)
            request = _request_fd(ours, self._request(task, arguments))
            child = await self._forked((request, theirs.fileno(), *fds, *self._held))
            theirs.close()  # so that the child's end is the pipe's end
            try:
                async with asyncio.timeout(timeout):
                    data = await _read_to_end(result)
            except TimeoutError:
                msg = f"{task} did not finish within {timeout:g} s and was killed"
                raise DeadlineExceeded(msg) from None
            finally:
                await to_the_end(_end(child))
        return _outcome(task, data, await _status(child))

    async def leave(self, task: str, arguments: Mapping[str, Any], fds: Sequence[int] = ()) -> LeftChild:
        """Run `task` in a child that may outlive the daemon; nobody gets its result. ZygoteLostError."""
        await self.start()
        with contextlib.ExitStack() as ours:
            request = _request_fd(ours, self._request(task, arguments))
            nowhere = _pipe(ours)[1]
            child = await self._forked((request, nowhere.fileno(), *fds, *self._held))
            return LeftChild(child.process, child.status)

    async def aclose(self) -> None:
        """End the zygote; children go on and are orphans from then on."""
        async with self._starting:
            if self._process is not None:
                self._lose("the daemon is stopping")
                await self._process.wait()
                self._process = None

    def _request(self, task: str, arguments: Mapping[str, Any]) -> bytes:
        call = {"path": self.search_path, "task": task, "arguments": arguments, "held": len(self._held)}
        return json.dumps(call).encode()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [sys.executable, "-I", "-S", os.fspath(_PROGRAM), str(theirs.fileno())]
            if self._preload:
                argv += [":".join(self.search_path), *self._preload]
            started = await asyncio.to_thread(process.spawn, argv, stderr=2, pass_fds=(theirs.fileno(),))
            # Or nobody would reap one that has died and been replaced, and it would hide others from the Reaper.
            self._process = started.watched()
        ours.setblocking(False)
        self._channel = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._receive)

    async def _forked(self, fds: Sequence[int]) -> _Child:
        """A fork that is cancelled half-way is still waited for, since its child has to be ended."""
        fork = asyncio.ensure_future(self._fork(fds))
        try:
            return await asyncio.shield(fork)
        except asyncio.CancelledError:
            await to_the_end(_end_late(fork))
            raise

    async def _fork(self, fds: Sequence[int]) -> _Child:
        if len(fds) > _MAX_DESCRIPTORS:
            msg = f"a task with {len(fds)} descriptors, at most {_MAX_DESCRIPTORS} can be passed"
            raise ResourceExhausted(msg)
        loop = asyncio.get_running_loop()
        forked: asyncio.Future[_Child] = loop.create_future()
        while True:
            if self._channel is None:
                raise ZygoteLostError("the zygote has died")
            try:
                socket.send_fds(self._channel, [b"fork"], fds)
            except BlockingIOError:
                await asyncio.sleep(0.005)  # hundreds of requests are queued; the zygote takes one in a few ms
            except OSError as error:
                self._lose(f"its socket failed: {error.strerror}")
            else:
                self._forks.append(forked)
                return await forked

    def _receive(self) -> None:
        if self._channel is None:
            return
        try:
            message, fds, _, _ = socket.recv_fds(self._channel, _MESSAGE, 1)
        except BlockingIOError:
            return
        except OSError:
            message, fds = b"", []
        if not message:
            self._lose("it ended")
            return
        self._take(json.loads(message), fds)

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        if "exited" in message:
            status = self._children.pop(message["exited"], None)
            if status is not None and not status.done():
                status.set_result(os.waitstatus_to_exitcode(message["status"]))
            return
        forked = self._forks.popleft()
        if "refused" in message:
            hint = "look at the limits of processes and memory on this node"
            forked.set_exception(ResourceExhausted(f"the zygote cannot start a child: {message['refused']}", hint=hint))
            return
        status = asyncio.get_running_loop().create_future()
        self._children[message["pid"]] = status
        forked.set_result(_Child(process.Child(message["pid"], fds[0]), status))

    def _lose(self, reason: str) -> None:
        """Forget a zygote that is gone or out of step. Children that it has forked go on, only their status is lost."""
        channel, self._channel = self._channel, None
        if channel is not None:
            asyncio.get_running_loop().remove_reader(channel.fileno())
            channel.close()
        while self._forks:
            self._forks.popleft().set_exception(
                ZygoteLostError(f"the zygote died before it could start a task: {reason}")
            )
        for status in self._children.values():
            status.cancel()
        self._children.clear()


def _own_search_path() -> list[str]:
    """The package's own directory first: an editable install is not on sys.path."""
    package = str(Path(cri_shim.__file__).parent.parent)
    return [package, *(entry for entry in sys.path if entry and entry != package)]


def _pipe(stack: contextlib.ExitStack) -> tuple[int, io.FileIO]:
    """A pipe for a result: our end, which does not block, and the child's."""
    read, write = os.pipe2(os.O_CLOEXEC)
    stack.callback(os.close, read)
    os.set_blocking(read, False)
    return read, stack.enter_context(io.FileIO(write, "wb"))


def _request_fd(stack: contextlib.ExitStack, request: bytes) -> int:
    """A request of any size as one descriptor; a datagram has a limit that depends on the host."""
    fd = os.memfd_create("request", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    os.write(fd, request)
    return fd


async def _read_to_end(fd: int) -> bytes:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    chunks: list[bytes] = []

    def readable() -> None:
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        chunks.append(chunk)
        if not chunk and not ended.done():
            ended.set_result(None)

    loop.add_reader(fd, readable)
    try:
        await ended
    finally:
        loop.remove_reader(fd)
    return b"".join(chunks)


async def _end(child: _Child) -> None:
    child.process.kill()
    await child.process.wait()


async def _end_late(fork: asyncio.Future[_Child]) -> None:
    with contextlib.suppress(CriShimError):
        await _end(await fork)


async def _status(child: _Child) -> int | None:
    """The exit status as subprocess has it; None when the zygote died and nobody knows it."""
    await asyncio.wait((child.status,), timeout=_EXIT_WAIT)
    return child.status.result() if child.status.done() and not child.status.cancelled() else None


def _outcome(task: str, data: bytes, status: int | None) -> dict[str, Any]:
    try:
        outcome = json.loads(data)
    except ValueError:
        raise TaskEndedError(task, status) from None
    if "error" in outcome:
        raise TaskError(task, outcome["error"])
    value: dict[str, Any] = outcome["value"]
    return value
