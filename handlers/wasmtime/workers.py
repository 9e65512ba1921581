"""Containers in worker processes: start one, talk to it, find it again after a restart of the daemon.

    fork ─▶ cgroup, note ─▶ go ─▶ into the cgroup ─▶ started │ … │ ended (pidfd) ─▶ exit file, OOM facts ─▶ Exit

Not what runs there (`handlers.wasmtime.worker`). Invariant: everything about a worker is in its container's bundle, so
that a later daemon takes it over, and removes it, by id.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal as signals
import socket
import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec

from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.process_cgroup import ProcessCgroups
from cri_shim.adapters.zygote import Zygote, ZygoteLostError
from cri_shim.kernel import fs, process, tty
from cri_shim.model.container import Exit, Reason
from cri_shim.model.errors import CriShimError, DeadlineExceeded, FailedPrecondition, Internal
from cri_shim.model.handler import ExecRequest, Started, TerminalRequest
from cri_shim.model.ids import ContainerId
from cri_shim.spec.cgroup_plan import Driver
from handlers.wasmtime.applets.facts import Facts
from handlers.wasmtime.guest_spec import GuestSpec, WorkerSpec
from handlers.wasmtime.worker_channel import ANSWER_SECONDS, Channel, GoneError
from handlers.wasmtime.worker_files import Files, noted, running, said, short_name
from handlers.wasmtime.worker_run import LOST, WorkerExec, WorkerRun, known

TASK: Final = "handlers.wasmtime.worker:run"
EXEC_TASK: Final = "handlers.wasmtime.worker:run_exec"
_MODULE: Final = TASK.partition(":")[0]
_COMPONENTS: Final = (
    "handlers.wasmtime.component",
    "handlers.wasmtime.wasip2.http_outgoing",
    "handlers.wasmtime.wasip2.http_proxy",
    "handlers.wasmtime.wasip2.http_types",
)
"""And what only some of them need: each of those would have 2 MiB of its own."""
_REHEARSAL: Final = "handlers.wasmtime.rehearsal:rehearse"
_KILL_SECONDS: Final = 2.0
"""How long a worker may take to go that was killed before its module ran: it may be stuck in the kernel."""
_SCOPE_SECONDS: Final = 1.0
_SCOPE_PAUSE: Final = 0.02
_KILLED: Final = 128 + signals.SIGKILL


class Workers:
    """Makes and finds workers. A zygote starts with the first that it forks."""

    def __init__(self, context: HandlerContext) -> None:
        self._context = context
        # Two, since most nodes have no components: what they need is a third of what is loaded with it.
        self._zygotes = {False: Zygote(preload=(_MODULE, _REHEARSAL)), True: Zygote(preload=(_MODULE, *_COMPONENTS))}
        self._placing = threading.Lock()
        self._watches: set[asyncio.Task[None]] = set()

    @cached_property
    def _cgroups(self) -> ProcessCgroups:
        return ProcessCgroups(self._context.cgroups)

    def _zygote(self, spec: GuestSpec) -> Zygote:
        return self._zygotes[spec.entry.component]

    async def prepare(self, spec: GuestSpec) -> None:
        """Have the zygote at hand, so that no start waits for it."""
        await self._zygote(spec).start()

    async def start(
        self, container_id: ContainerId, spec: GuestSpec, compiled: Path, ended: Callable[[Exit], None]
    ) -> tuple[WorkerRun, Started]:
        """Returns when the module is linked and about to run; `ended` follows exactly once."""
        if spec.worker is None:
            msg = f"container {container_id} was prepared for the daemon's process"
            raise Internal(msg)
        files = Files(self._context.layout.bundle(container_id))
        opened = await asyncio.to_thread(self._prepare, spec.worker, files)
        try:
            run, status = await self._fork(container_id, spec, compiled, opened)
        finally:
            opened.close()
        try:
            await asyncio.to_thread(self._place, run)
            run.channel.send({"go": True})
            answer = await run.channel.answer("started")
        except BaseException as error:
            run.channel.close()
            run.process.kill()
            await asyncio.wait((asyncio.ensure_future(run.process.wait()),), timeout=_KILL_SECONDS)
            if isinstance(error, GoneError):
                raise await self._why_gone(run, status) from None
            raise
        self._watch(run, ended, status)
        return run, Started(pid=run.process.pid, at=answer)

    async def adopt(
        self, container_id: ContainerId, spec: GuestSpec, ended: Callable[[Exit], None]
    ) -> WorkerRun | Exit:
        """The running worker of an earlier daemon, or how it has ended meanwhile."""
        files = Files(self._context.layout.bundle(container_id))
        child = None if await asyncio.to_thread(said, files) else await asyncio.to_thread(running, files)
        if child is None:
            return await asyncio.to_thread(self._exit, container_id, spec.worker, files)
        try:
            channel = Channel.connect(files)
        except OSError:  # it has just ended
            child.kill()
            await child.wait()
            return await asyncio.to_thread(self._exit, container_id, spec.worker, files)
        channel.listen()
        run = WorkerRun(container_id, spec, files, child, self._context, channel)
        self._watch(run, ended, None)
        return run

    async def exec(
        self, container_id: ContainerId, spec: GuestSpec, program: Path | Facts, request: ExecRequest | TerminalRequest
    ) -> WorkerExec:
        """A further process, of a compiled module or an applet; `spec` has its arguments, and who it is."""
        if spec.worker is None:
            msg = "no worker was asked for"
            raise Internal(msg)
        files = Files(self._context.layout.bundle(container_id))
        with contextlib.ExitStack() as opened:
            wait, go = os.pipe2(os.O_CLOEXEC)
            opened.callback(os.close, wait)
            opened.callback(os.close, go)
            places = await asyncio.to_thread(_exec_places, files, spec.worker.netns, opened)
            streams, master = _standard_streams(request, opened)
            if_it_fails = opened.enter_context(contextlib.ExitStack())
            if master >= 0:
                if_it_fails.callback(os.close, master)
            arguments = {
                "id": container_id,
                "spec": msgspec.json.encode(spec).decode(),
                "empty": str(files.empty),
                **(
                    {"compiled": str(program)}
                    if isinstance(program, Path)
                    else {"applet": msgspec.json.encode(program).decode()}
                ),
            }
            child = await self._zygote(spec).leave(EXEC_TASK, arguments, [wait, *streams, *places])
            try:
                await asyncio.to_thread(self._place_exec, child.process.pid, container_id, spec.worker)
                if master >= 0:
                    await asyncio.to_thread(tty.wait_for_owner, master, ANSWER_SECONDS)
                os.write(go, b"g")
            except BaseException:
                child.process.kill()
                raise
            if_it_fails.pop_all()
            return WorkerExec(child, spec.argv, master)

    def _place_exec(self, pid: int, container_id: ContainerId, worker: WorkerSpec) -> None:
        """Into the container's cgroup, which is made if the container is not in one."""
        with self._placing:
            deadline = time.monotonic() + _SCOPE_SECONDS
            while True:
                with contextlib.suppress(OSError):
                    self._cgroups.join(pid, worker.cgroup_parent, container_id)
                    return
                try:
                    self._cgroups.enter(pid, worker.cgroup_parent, container_id, {})
                except FailedPrecondition:  # the scope of a process that has just ended may still be there
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_SCOPE_PAUSE)
                else:
                    return

    async def aclose(self) -> None:
        """Let go of all; they run on."""
        for watch in tuple(self._watches):
            watch.cancel()
        for zygote in self._zygotes.values():
            await zygote.aclose()

    def leave(self, run: WorkerRun) -> None:
        """Stop watching one; it runs on."""
        if run.watch is not None:
            run.watch.cancel()
        run.channel.close()
        run.process.close()

    def remove(self, container_id: ContainerId, cgroup_parent: str) -> None:
        """Kill what runs, remove cgroup and files. Blocks. Gone is success; DeadlineExceeded when it does not die."""
        files, cgroups = Files(self._context.layout.bundle(container_id)), self._context.cgroups
        note = noted(files)
        if note is not None and process.is_alive(note.pid, note.started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(note.pid, signals.SIGKILL)
        if not cgroups.kill_all(cgroup_parent, container_id):
            msg = f"the Wasm worker of container {container_id} does not end"
            raise DeadlineExceeded(msg, hint="it may be stuck in the kernel (state D)")
        cgroups.remove(cgroup_parent, container_id)
        files.remove()

    @staticmethod
    def _prepare(worker: WorkerSpec, files: Files) -> _Opened:
        files.remove()
        files.empty.mkdir(mode=0o755)
        return _Opened(files, worker.netns)

    async def _fork(
        self, container_id: ContainerId, spec: GuestSpec, compiled: Path, opened: _Opened
    ) -> tuple[WorkerRun, asyncio.Future[int]]:
        arguments = {
            "id": container_id,
            "spec": msgspec.json.encode(msgspec.structs.replace(spec, identity=None)).decode(),
            "compiled": str(compiled),
            "empty": str(opened.files.empty),
            "cgroups": [] if spec.worker is None else self._cgroups.doors(spec.worker.cgroup_parent, container_id),
        }
        channel = Channel(opened.connection)
        try:
            try:
                child = await self._zygote(spec).leave(TASK, arguments, opened.descriptors)
            except ZygoteLostError:
                child = await self._zygote(spec).leave(TASK, arguments, opened.descriptors)
        except BaseException:
            channel.close()
            raise
        channel.listen()
        return WorkerRun(container_id, spec, opened.files, child.process, self._context, channel), child.status

    def _place(self, run: WorkerRun) -> None:
        pid, worker = run.process.pid, run.worker
        kills = self._context.cgroups.unclaimed_oom_kills(worker.cgroup_parent, run.container_id)
        note = f"{pid} {process.process_start_time(pid) or 0} {kills}"
        fs.atomic_write(run.files.note, note.encode(), 0o600)
        self._cgroups.make(pid, worker.cgroup_parent, run.container_id, worker.limits)

    async def _why_gone(self, run: WorkerRun, status: asyncio.Future[int]) -> CriShimError:
        """What ended a worker before its module ran, which has had no output yet."""
        code = await known(status)
        told = await asyncio.to_thread(self._unsaid, run.container_id, run.worker, run.files, code)
        hint = "loading a module takes memory too, in a process of its own within the limit"
        msg = f"the Wasm module could not be started: {told.message}"
        return FailedPrecondition(msg, hint=hint if told.reason is Reason.OOM_KILLED else "")

    def _watch(self, run: WorkerRun, ended: Callable[[Exit], None], status: asyncio.Future[int] | None) -> None:
        async def watch() -> None:
            gone = asyncio.ensure_future(run.process.wait())
            await asyncio.wait((gone, run.channel.left), return_when=asyncio.FIRST_COMPLETED)
            told = await asyncio.to_thread(said, run.files)
            if told is None:  # then only does it matter what the zygote says, which has to reap it first
                code = await known(status)
                told = await asyncio.to_thread(self._unsaid, run.container_id, run.worker, run.files, code)
            run.channel.close()
            if run.killed and told.reason is Reason.UNKNOWN:
                told = msgspec.structs.replace(told, code=_KILLED, reason=Reason.ERROR, message="")
            ended(told)
            await gone  # long after, if the kernel waits for its log

        run.watch = asyncio.create_task(watch())
        self._watches.add(run.watch)
        run.watch.add_done_callback(self._watches.discard)

    def _exit(self, container_id: ContainerId, worker: WorkerSpec | None, files: Files) -> Exit:
        """Of one that ended while no daemon was there."""
        return said(files) or self._unsaid(container_id, worker, files, None)

    def _unsaid(self, container_id: ContainerId, worker: WorkerSpec | None, files: Files, code: int | None) -> Exit:
        """How it was killed."""
        at = time.time_ns()
        if worker is not None and self._was_out_of_memory(container_id, worker, files):
            return Exit(code=_KILLED, at=at, reason=Reason.OOM_KILLED, message="the memory limit was reached")
        if code is not None and code < 0:
            name = signals.Signals(-code).name
            return Exit(code=128 - code, at=at, reason=Reason.ERROR, message=f"the worker was ended by {name}")
        return Exit(code=LOST, at=at, reason=Reason.UNKNOWN, message="the worker is gone and left no exit status")

    def _was_out_of_memory(self, container_id: ContainerId, worker: WorkerSpec, files: Files) -> bool:
        cgroups, note = self._context.cgroups, noted(files)
        if cgroups.driver is Driver.SYSTEMD and note is not None:  # the scope has gone, and its counter with it
            return cgroups.oom_killed_since(worker.cgroup_parent, container_id, note.oom_kills)
        return bool(cgroups.oom_kills(worker.cgroup_parent, container_id))


class _Opened:
    """What is passed to a worker that is to be forked: a connection, the listening socket, the exit file, the network.

    The daemon's end of the connection is the caller's, to be closed or used.
    """

    def __init__(self, files: Files, netns: str) -> None:
        self.files = files
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(short_name(files.socket, stack))
            listener.listen()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            exit_fd = os.open(files.exit, flags, 0o600)
            stack.callback(os.close, exit_fd)
            namespaces = [os.open(netns, os.O_RDONLY | os.O_CLOEXEC)] if netns else []
            for namespace in namespaces:
                stack.callback(os.close, namespace)
            self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(theirs)
            self.descriptors = [theirs.fileno(), listener.fileno(), exit_fd, *namespaces]
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()


def _standard_streams(request: ExecRequest | TerminalRequest, opened: contextlib.ExitStack) -> tuple[list[int], int]:
    """Those of a further process, and the master end of its terminal, which is the caller's; -1 without one.

    What is opened for them is closed by `opened`.
    """
    if isinstance(request, TerminalRequest):
        master, slave = os.openpty()
        opened.callback(os.close, slave)
        if request.size is not None:
            tty.set_size(master, request.size)
        return [slave] * 3, master
    stdin = request.stdin
    if stdin is None:
        stdin, writer = os.pipe2(os.O_CLOEXEC)  # at its end
        os.close(writer)
        opened.callback(os.close, stdin)
    return [stdin, request.stdout, request.stderr], -1


def _exec_places(files: Files, netns: str, opened: contextlib.ExitStack) -> list[int]:
    """The directory to be shut up in is made; the descriptor of the network namespace, if it is not the host's."""
    files.empty.mkdir(mode=0o755, exist_ok=True)
    if not netns:
        return []
    namespace = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    opened.callback(os.close, namespace)
    return [namespace]
