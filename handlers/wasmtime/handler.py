"""The handler of kind wasmtime: containers whose process is a thread of the daemon, or a worker.

The engine's library is loaded by the first module, not before: a handler that is configured and not used costs nothing.
Invariant: a container's end is told after its last byte is in the log. Once the daemon is stopping, no end of a module
in its process is told: the next daemon reports such containers as lost. Workers run on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from weakref import WeakKeyDictionary

import msgspec

from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.shielded import to_the_end
from cri_shim.kernel import fs
from cri_shim.kernel.pauses import load
from cri_shim.model.container import ContainerRecord, ContainerState, Exit, Reason
from cri_shim.model.errors import DeadlineExceeded, FailedPrecondition, NotFound
from cri_shim.model.handler import (
    Attachment,
    ContainerPlan,
    ExecRequest,
    ExecSession,
    Features,
    HandlerStats,
    Kind,
    Started,
    TerminalRequest,
)
from cri_shim.model.ids import SHORT, ContainerId, Digest, ImageId
from cri_shim.pb import api_pb2 as pb
from cri_shim.wire.wasm_shape import UNKNOWN, Shape
from handlers.wasmtime import preopens, wishes
from handlers.wasmtime.applets.facts import Facts, Process
from handlers.wasmtime.attachment import attach
from handlers.wasmtime.cache import ModuleCache
from handlers.wasmtime.diagnosis import facts, first_process
from handlers.wasmtime.ending import ends_guest
from handlers.wasmtime.guest_plan import as_worker, further, guest_spec, with_limits, with_listeners
from handlers.wasmtime.guest_spec import STDIN, Entry, GuestSpec, Listen
from handlers.wasmtime.in_process import Guests
from handlers.wasmtime.limits import identity, worker_limits, worker_spec
from handlers.wasmtime.module_file import find_further, find_module, is_component, read_head, shape_of
from handlers.wasmtime.options import WasmtimeOptions
from handlers.wasmtime.placement import Isolation, place
from handlers.wasmtime.refusals import refuse, refuse_in_process
from handlers.wasmtime.run import Run
from handlers.wasmtime.worker_run import WorkerExec, WorkerRun
from handlers.wasmtime.workers import Workers

_SPEC: Final = "wasm.json"
_WORK: Final = "wasm"
_KILL_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 5.0
_LOG_SECONDS: Final = 5.0
_LOST: Final = 255


@dataclass(slots=True)
class _Container:
    """`run` is set by the start that succeeds; `ended` when its end has been told.

    `early` is the first signal that came while it was starting.
    """

    spec: GuestSpec
    compiled: Path
    is_compiled: bool
    """Already, when its files were looked at."""
    stop_signal: int
    image: ImageId | None
    bare: bool = False
    """All that was made for it is files in its bundle."""
    run: Run | None = None
    early: int | None = None
    sessions: WeakKeyDictionary[WorkerExec, int] = field(default_factory=WeakKeyDictionary)
    """Its further processes, with the numbers that `ps` shows."""
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))
    forked: bool = False
    """There are, or were, processes of it."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> bool:
        return self.run is not None and not self.ended.is_set()


class WasmtimeHandler:
    """`cri_shim.model.handler.Handler`. All methods belong to the event loop."""

    kind = Kind.WASM
    # A read-only preopen is so at every depth, whatever is mounted below it.
    features = Features(
        recursive_read_only_mounts=True,
        no_user_namespaces="a Wasm module opens files with the users of the node",
    )

    def __init__(self, name: str, options: WasmtimeOptions, context: HandlerContext, daemon_uid: int) -> None:
        self.name = name
        self._options = options
        self._context = context
        self._daemon_uid = daemon_uid
        self._may_mount = "SYS_ADMIN" in context.capabilities
        self._cache = ModuleCache(context.modules, context.zygote)
        self._guests = Guests(context.cgroups.host)
        self._workers = Workers(context)
        self._containers: dict[ContainerId, _Container] = {}
        self._closing = False

    async def probe(self) -> None:
        """Nothing to ask; see `Handler`."""

    async def create(self, plan: ContainerPlan) -> None:
        """Find the module, decide where it runs, open the way to its files, have it compiled if nobody has."""
        refuse(plan)
        try:
            container = await asyncio.to_thread(self._prepare, plan, self._readers())
            await self._add(plan.id, container)
        except BaseException:
            await to_the_end(self._context.modules.release(plan.id))
            await asyncio.to_thread(_remove, plan.bundle)
            raise

    async def compile_ahead(self, module: Path, digest: Digest, name: str) -> None:
        """See `CompilesAhead`."""
        head = await asyncio.to_thread(read_head, module)
        await self._cache.compile(Entry(str(module), digest, "", is_component(head, name)), ahead=True)

    def _readers(self) -> int:
        """Modules that have standard input in the daemon, or will have."""
        return sum(
            bool(each.spec.stdin) and each.spec.worker is None and not each.ended.is_set()
            for each in self._containers.values()
        )

    def _prepare(self, plan: ContainerPlan, readers: int) -> _Container:
        """The part of `create` that touches files; `_remove` undoes it."""
        entry, argv0 = find_module(plan, self._context.layout)
        opened = preopens.arrange(plan, plan.bundle / _WORK, may_mount=self._may_mount)
        shape = UNKNOWN if entry.component else shape_of(Path(entry.path))
        placement = place(
            plan,
            self._options.isolation,
            opened,
            self._daemon_uid,
            component=entry.component,
            readers=readers,
            description=shape.description,
        )
        spec = guest_spec(plan, entry, argv0, opened, identity(plan, placement.why, self._context))
        if not entry.component and (ports := wishes.ports(plan)):
            spec = with_listeners(spec, self._listen(plan, ports))
        if placement.isolation is Isolation.PROCESS:
            spec = as_worker(spec, worker_spec(plan, placement.why, self._context))
        else:
            refuse_in_process(plan.config.linux.resources)
            spec = self._in_process(plan, spec, shape)
        fs.atomic_write(plan.bundle / _SPEC, msgspec.json.encode(spec), 0o600)
        if spec.stdin:
            os.mkfifo(spec.stdin, 0o600)
        container = self._look_up(spec, plan.stop_signal, plan.image.id if plan.image is not None else None)
        container.bare = spec.worker is None and not plan.config.mounts
        return container

    def _in_process(self, plan: ContainerPlan, spec: GuestSpec, shape: Shape) -> GuestSpec:
        """What the daemon has to hold itself against."""
        counts = spec.listen is None and spec.preopens and shape.opens_files
        return msgspec.structs.replace(spec, shape=shape, listen=self._listen(plan, ()) if counts else spec.listen)

    def _listen(self, plan: ContainerPlan, ports: tuple[int, ...]) -> Listen:
        nothing = plan.bundle / _WORK / "nothing"
        if ports:
            nothing.mkdir(parents=True)
        front, back = (str(self._cache.path(entry)) for entry in self._cache.forwarding())
        netns = str(plan.pod.net) if plan.pod.net is not None else ""
        return Listen(ports=ports, netns=netns, front=front, back=back, nothing=str(nothing))

    def _look_up(self, spec: GuestSpec, stop_signal: int, image: ImageId | None) -> _Container:
        # Loads the engine here, so that no start has to.
        load(f"handlers.wasmtime.{'core_module' if spec.worker is None else 'engine'}")
        compiled = self._cache.path(spec.entry)
        return _Container(spec, compiled, compiled.exists(), stop_signal, image)

    async def _add(self, container_id: ContainerId, container: _Container) -> None:
        entry, seen = container.spec.entry, container.is_compiled
        await self._compile(container_id, entry, container.image, seen=seen)
        if container.spec.listen is not None:
            for entry in await asyncio.to_thread(self._cache.forwarding):
                await self._cache.compile(entry)
        if container.spec.worker is not None:
            await self._workers.prepare(container.spec)
        self._containers[container_id] = container

    async def _compile(
        self, container_id: ContainerId, entry: Entry, image: ImageId | None, *, seen: bool = False
    ) -> Path:
        """Have a module compiled for as long as the container or its image is here."""
        await self._context.modules.use(container_id, entry.digest, image)
        return await self._cache.compile(entry, seen=seen)

    async def start(self, container_id: ContainerId) -> Started:
        """Returns when the module is linked and about to run."""
        container = self._known(container_id)
        if container.run is not None:
            msg = f"container {container_id[:SHORT]} has been started before"
            raise FailedPrecondition(msg)
        start = self._guests.start if container.spec.worker is None else self._workers.start
        container.early = None
        container.run, started = await start(
            container_id, container.spec, container.compiled, self._teller(container_id, container)
        )
        self._catch_up(container)
        return started

    @staticmethod
    def _catch_up(container: _Container) -> None:
        """A signal that came while it was starting."""
        if container.early is not None and container.run is not None:
            container.run.stop(container.early)

    def _teller(self, container_id: ContainerId, container: _Container) -> Callable[[Exit], None]:
        def ended(how: Exit) -> None:
            container.ended.set()
            for session in tuple(container.sessions):
                session.end()
            if not self._closing:
                self._context.exited(container_id, how)

        return ended

    async def update(
        self, container_id: ContainerId, now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources
    ) -> None:
        """FailedPrecondition for less memory than a module has that runs in the daemon; see `refuse_in_process`."""
        container = self._known(container_id)
        if container.spec.worker is not None:
            spec = as_worker(container.spec, worker_limits(container.spec.worker, wanted, self._context))
        else:
            refuse_in_process(wanted)
            spec = with_limits(container.spec, wanted)
        if container.running and container.run is not None:
            await container.run.update(spec, now, wanted)
        path = self._context.layout.bundle(container_id) / _SPEC
        await asyncio.to_thread(fs.atomic_write, path, msgspec.json.encode(spec), 0o600)
        container.spec = spec

    async def kill(self, container_id: ContainerId, signal: int, *, everyone: bool = False) -> None:
        """A module is one thread: `everyone` changes nothing. Signals that it would ignore are success."""
        container = self._containers.get(container_id)
        if container is None or not ends_guest(signal, container.stop_signal):
            return
        if container.run is not None:
            container.run.stop(signal)
        elif container.early is None:
            container.early = signal

    async def delete(self, container_id: ContainerId, cgroup_parent: str) -> None:
        """DeadlineExceeded when the guest is in a call of the host that nothing ends (a FIFO in a volume)."""
        container = self._containers.get(container_id)
        if container is not None and container.run is not None:
            container.run.stop(signal.SIGKILL)
            try:
                async with asyncio.timeout(_KILL_SECONDS):
                    await container.ended.wait()
            except TimeoutError:
                msg = f"the Wasm module of container {container_id[:SHORT]} did not end within {_KILL_SECONDS:g} s"
                raise DeadlineExceeded(msg, hint="it waits for a file of a volume; let that go on") from None
        # Of what an earlier daemon has left nothing is known.
        forked = container is None or container.spec.worker is not None or container.forked
        if forked or container is None or not container.bare:
            await asyncio.to_thread(self._remove, container_id, cgroup_parent, forked=forked)
        await self._context.modules.release(container_id)
        self._containers.pop(container_id, None)

    def _remove(self, container_id: ContainerId, cgroup_parent: str, *, forked: bool) -> None:
        if forked:
            self._workers.remove(container_id, cgroup_parent)
        _remove(self._context.layout.bundle(container_id))

    async def exec(self, container_id: ContainerId, request: ExecRequest | TerminalRequest) -> ExecSession:
        """A process of its own: another instance of the container's module, another module of its image, an applet."""
        container = self._known(container_id)
        if container.run is None or not container.running:
            msg = f"container {container_id[:SHORT]} is not running"
            raise FailedPrecondition(msg)
        if self._daemon_uid != 0:
            msg = "exec into a Wasm container needs a process of its own, which only a daemon with root can make"
            raise FailedPrecondition(msg)
        number = next(container.numbers)
        entry = await asyncio.to_thread(find_further, container.spec, request.args[0])
        program: Path | Facts
        if entry is None:
            program = facts(container.spec, request.args, self._processes(container, number, request))
        else:
            program = await self._compile(container_id, entry, container.image)
        terminal = isinstance(request, TerminalRequest)
        has_input = not isinstance(request, TerminalRequest) and request.stdin is not None
        entry = entry or container.spec.entry
        spec = further(container.spec, entry, request.args, has_input=has_input, terminal=terminal)
        container.forked = True
        session = await self._workers.exec(container_id, spec, program, request)
        container.sessions[session] = number
        return session

    @staticmethod
    def _processes(container: _Container, number: int, request: ExecRequest | TerminalRequest) -> tuple[Process, ...]:
        """All that run now, and the one that is to be."""
        others = ((number, session) for session, number in container.sessions.items() if session.pid)
        return (
            first_process(container.spec, container.run),
            *(Process(pid=at, command=" ".join(it.argv), proc=str(it.pid)) for at, it in sorted(others)),
            Process(pid=number, command=" ".join(request.args), proc="self"),
        )

    async def attach(self, container_id: ContainerId, *, stdin: bool) -> Attachment:
        """A copy of the output, and the FIFO of the input."""
        container = self._known(container_id)
        if container.run is None or not container.running:
            msg = f"container {container_id[:SHORT]} is not running"
            raise FailedPrecondition(msg)
        return await attach(container.run, stdin=stdin)

    async def reopen_log(self, container_id: ContainerId) -> None:
        """FailedPrecondition when the new file cannot be made; the old one is written on then."""
        container = self._containers.get(container_id)
        if container is None or container.run is None or not container.running:
            msg = f"container {container_id[:SHORT]} is not running"
            raise FailedPrecondition(msg)
        try:
            async with asyncio.timeout(_LOG_SECONDS):
                await container.run.reopen_log()
        except TimeoutError:
            msg = f"the log {container.spec.log_path} cannot be opened anew: its file system does not answer"
            raise DeadlineExceeded(msg, hint="the container is held up until it does") from None
        except OSError as error:
            msg = f"cannot open the container's log {container.spec.log_path}: {error.strerror}"
            raise FailedPrecondition(msg) from error

    async def adopt(self, record: ContainerRecord, plan: ContainerPlan) -> Exit | Started | None:
        """A module in the daemon was lost with it, a worker runs on; one that was only created can still be started."""
        running = record.state is ContainerState.RUNNING
        spec = await asyncio.to_thread(_stored, plan.bundle)
        if running and (spec is None or spec.worker is None):
            return _lost("the daemon restarted; the Wasm container ran inside it")
        if spec is None:
            return _lost("what was prepared for the Wasm container is gone; the node has restarted")
        container = await asyncio.to_thread(self._look_up, spec, record.stop_signal, record.image_id)
        if running:
            await self._context.modules.use(record.id, spec.entry.digest, record.image_id)
            self._containers[record.id] = container
            found = await self._workers.adopt(record.id, spec, self._teller(record.id, container))
            if isinstance(found, Exit):
                del self._containers[record.id]
                await self._context.modules.release(record.id)
                return found
            container.run = found
            return None
        await self._add(record.id, container)
        return None

    def info(self, container_id: ContainerId) -> Mapping[str, object]:
        """The placement, the module, its preopens and its limits."""
        container = self._containers.get(container_id)
        if container is None:
            return {}
        spec, worker = container.spec, container.spec.worker
        return {
            "placement": "in-process" if worker is None else "process",
            "placementReason": spec.identity.why if spec.identity is not None else "",
            "module": spec.entry.digest,
            "function": spec.entry.function,
            "compiled": str(container.compiled),
            "preopens": [msgspec.to_builtins(preopen) for preopen in spec.preopens],
            "memoryLimit": spec.memory_limit,
            "cpuLimit": msgspec.to_builtins(spec.cpu),
            "nice": spec.nice,
            "listen": list(spec.listen.ports) if spec.listen is not None else [],
            "http": [list(address) for address in spec.http.addresses] if spec.http is not None else [],
            **(container.run.info() if container.run is not None else {}),
        }

    def stats(self, container_id: ContainerId) -> HandlerStats | None:
        """See `Handler`."""
        container = self._containers.get(container_id)
        return container.run.stats() if container is not None and container.run is not None else None

    def _known(self, container_id: ContainerId) -> _Container:
        container = self._containers.get(container_id)
        if container is None:
            msg = f"container {container_id[:SHORT]} is not known to handler {self.name!r}"
            raise NotFound(msg)
        return container

    async def aclose(self) -> None:
        """End the modules in the daemon, which cannot outlive it; the next one reports them. Leave the workers."""
        self._closing = True
        await self._context.modules.aclose()
        running = [container for container in self._containers.values() if container.running]
        in_process = [container for container in running if container.spec.worker is None]
        for container in running:
            if isinstance(container.run, WorkerRun):
                self._workers.leave(container.run)
            elif container.run is not None:
                container.run.stop(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                for container in in_process:
                    await container.ended.wait()
        await self._workers.aclose()
        await asyncio.to_thread(self._guests.close)


def _stored(bundle: Path) -> GuestSpec | None:
    """What `create` has written; None when there is nothing."""
    with contextlib.suppress(FileNotFoundError):
        return msgspec.json.decode((bundle / _SPEC).read_bytes(), type=GuestSpec)
    return None


def _lost(message: str) -> Exit:
    return Exit(code=_LOST, at=time.time_ns(), reason=Reason.UNKNOWN, message=message)


def _remove(bundle: Path) -> None:
    preopens.dismantle(bundle / _WORK)
    for name in (_SPEC, STDIN):
        (bundle / name).unlink(missing_ok=True)
