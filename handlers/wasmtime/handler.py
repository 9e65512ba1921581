"""The handler of kind wasmtime: containers whose process is a thread of the daemon.

The engine's library is loaded by the first module, not before: a handler that is configured and not used costs nothing.
Invariant: a container's end is told after its last byte is in the log, and not at all once the daemon is stopping: the
next daemon reports such containers as lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec

from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.log_pump import LogPump
from cri_shim.kernel import fs
from cri_shim.model.container import ContainerRecord, ContainerState, Exit, Reason
from cri_shim.model.errors import CriShimError, DeadlineExceeded, FailedPrecondition, NotFound, Unimplemented
from cri_shim.model.handler import ContainerPlan, ExecRequest, ExecSession, Features, HandlerStats, Kind, Started
from cri_shim.model.ids import SHORT, ContainerId
from cri_shim.pb import api_pb2 as pb
from handlers.wasmtime import preopens
from handlers.wasmtime.cache import ModuleCache
from handlers.wasmtime.ending import ends_guest
from handlers.wasmtime.guest_spec import GuestSpec, guest_spec, refuse_foreign_files, with_limits
from handlers.wasmtime.module_file import find_module
from handlers.wasmtime.quota import Throttle
from handlers.wasmtime.refusals import refuse, refuse_change

if TYPE_CHECKING:
    from handlers.wasmtime.guest import Guest

_SPEC: Final = "wasm.json"
_WORK: Final = "wasm"
_KILL_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 5.0
_LOST: Final = 255


@dataclass(slots=True)
class _Container:
    """`guest` is set by the start that succeeds; `ended` when its end has been told."""

    spec: GuestSpec
    compiled: Path
    stop_signal: int
    guest: Guest | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> bool:
        return self.guest is not None and not self.ended.is_set()


class WasmtimeHandler:
    """`cri_shim.model.handler.Handler`. All methods belong to the event loop."""

    kind = Kind.WASM
    # A read-only preopen is so at every depth, whatever is mounted below it.
    features = Features(recursive_read_only_mounts=True)

    def __init__(self, name: str, context: HandlerContext, daemon_uid: int) -> None:
        self.name = name
        self._context = context
        self._daemon_uid = daemon_uid
        self._may_mount = "SYS_ADMIN" in context.capabilities
        self._cache = ModuleCache(context.layout.wasm_cache, context.zygote)
        self._pump = LogPump()
        self._throttle = Throttle()
        self._containers: dict[ContainerId, _Container] = {}
        self._closing = False

    async def probe(self) -> None:
        """Nothing to ask; see `Handler`."""

    async def create(self, plan: ContainerPlan) -> None:
        """Find the module, open the way to its files, have it compiled if nobody has."""
        refuse(plan)
        try:
            container, is_compiled = await asyncio.to_thread(self._prepare, plan)
            await self._add(plan.id, container, is_compiled)
        except BaseException:
            await asyncio.to_thread(_remove, plan.bundle)
            raise

    def _prepare(self, plan: ContainerPlan) -> tuple[_Container, bool]:
        """The part of `create` that touches files; `_remove` undoes it."""
        entry, argv0 = find_module(plan, self._context.layout)
        opened = preopens.arrange(plan, plan.bundle / _WORK, may_mount=self._may_mount)
        refuse_foreign_files(plan, opened, self._daemon_uid)
        spec = guest_spec(plan, entry, argv0, opened)
        fs.atomic_write(plan.bundle / _SPEC, msgspec.json.encode(spec), 0o600)
        return self._look_up(spec, plan.stop_signal)

    def _look_up(self, spec: GuestSpec, stop_signal: int) -> tuple[_Container, bool]:
        """The container, and whether its module has been compiled."""
        import handlers.wasmtime.guest  # noqa: F401, PLC0415  loads the engine here, so that no start has to

        compiled = self._cache.path(spec.entry)
        return _Container(spec, compiled, stop_signal), compiled.exists()

    async def _add(self, container_id: ContainerId, container: _Container, is_compiled: bool) -> None:
        if not is_compiled:
            await self._cache.compile(container.spec.entry)
        self._containers[container_id] = container

    async def start(self, container_id: ContainerId) -> Started:
        """Returns when the module is linked and about to run."""
        from handlers.wasmtime.guest import Guest, Services  # noqa: PLC0415  loaded by `create`

        container = self._known(container_id)
        if container.guest is not None:
            msg = f"container {container_id[:SHORT]} has been started before"
            raise FailedPrecondition(msg)
        self._pump.start()
        news = _News(asyncio.get_running_loop(), container, lambda ended: self._ended(container_id, ended))
        if container.spec.cpu is not None:
            self._throttle.start()
        guest = Guest(container_id, container.spec, container.compiled, Services(self._pump, self._throttle, news))
        guest.start()
        container.guest = guest
        return Started(pid=0, at=await news.start)

    def _ended(self, container_id: ContainerId, ended: Exit) -> None:
        container = self._containers[container_id]
        container.ended.set()
        if not self._closing:
            self._context.exited(container_id, ended)

    async def update(
        self, container_id: ContainerId, now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources
    ) -> None:
        """Of a running module all but the memory limit, which is fixed by then: Unimplemented names it."""
        container = self._known(container_id)
        spec = with_limits(container.spec, wanted)
        if container.guest is None:
            path = self._context.layout.bundle(container_id) / _SPEC
            await asyncio.to_thread(fs.atomic_write, path, msgspec.json.encode(spec), 0o600)
        elif container.running:
            refuse_change(now, wanted)
            if spec.cpu is not None:
                self._throttle.start()
            _adjust(container.guest, spec)
        container.spec = spec

    async def kill(self, container_id: ContainerId, signal: int, *, everyone: bool = False) -> None:
        """A module is one thread: `everyone` changes nothing. Signals that it would ignore are success."""
        container = self._containers.get(container_id)
        if container is not None and container.guest is not None and ends_guest(signal, container.stop_signal):
            container.guest.stop(signal)

    async def delete(self, container_id: ContainerId, cgroup_parent: str) -> None:
        """DeadlineExceeded when the guest is in a call of the host that nothing ends (a FIFO in a volume)."""
        container = self._containers.get(container_id)
        if container is not None and container.guest is not None:
            container.guest.stop(signal.SIGKILL)
            try:
                async with asyncio.timeout(_KILL_SECONDS):
                    await container.ended.wait()
            except TimeoutError:
                msg = f"the Wasm module of container {container_id[:SHORT]} did not end within {_KILL_SECONDS:g} s"
                raise DeadlineExceeded(msg, hint="it waits for a file of a volume; let that go on") from None
        await asyncio.to_thread(_remove, self._context.layout.bundle(container_id))
        self._containers.pop(container_id, None)

    async def exec(self, container_id: ContainerId, request: ExecRequest) -> ExecSession:
        """Not yet."""
        _refuse_exec()

    async def reopen_log(self, container_id: ContainerId) -> None:
        """FailedPrecondition when the new file cannot be made; the old one is written on then."""
        container = self._containers.get(container_id)
        if container is None or not container.running or container.guest is None or container.guest.output is None:
            msg = f"container {container_id[:SHORT]} is not running"
            raise FailedPrecondition(msg)
        try:
            await asyncio.to_thread(container.guest.output.log.reopen)
        except OSError as error:
            msg = f"cannot open the container's log {container.spec.log_path}: {error.strerror}"
            raise FailedPrecondition(msg) from error

    async def adopt(self, record: ContainerRecord, plan: ContainerPlan) -> Exit | None:
        """A running module was lost with the daemon that ran it; one that was only created can still be started."""
        if record.state is ContainerState.RUNNING:
            return _lost("the daemon restarted; the Wasm container ran inside it")
        try:
            data = await asyncio.to_thread((plan.bundle / _SPEC).read_bytes)
        except FileNotFoundError:
            return _lost("what was prepared for the Wasm container is gone; the node has restarted")
        spec = msgspec.json.decode(data, type=GuestSpec)
        container, is_compiled = await asyncio.to_thread(self._look_up, spec, record.stop_signal)
        await self._add(record.id, container, is_compiled)
        return None

    def info(self, container_id: ContainerId) -> Mapping[str, object]:
        """The placement, the module, its preopens and its limits."""
        container = self._containers.get(container_id)
        if container is None:
            return {}
        spec, guest = container.spec, container.guest
        output = guest.output if guest is not None else None
        return {
            "placement": "in-process",
            "module": spec.entry.digest,
            "function": spec.entry.function,
            "compiled": str(container.compiled),
            "preopens": [msgspec.to_builtins(preopen) for preopen in spec.preopens],
            "memoryLimit": spec.memory_limit,
            "cpuLimit": msgspec.to_builtins(spec.cpu),
            "nice": spec.nice,
            "droppedLogBytes": output.log.dropped if output is not None else 0,
        }

    def stats(self, container_id: ContainerId) -> HandlerStats | None:
        """See `Handler`."""
        container = self._containers.get(container_id)
        if container is None or container.guest is None:
            return None
        metered = container.guest.meter.read()
        return HandlerStats(metered.cpu_ns, metered.memory, container.spec.memory_limit)

    def _known(self, container_id: ContainerId) -> _Container:
        container = self._containers.get(container_id)
        if container is None:
            msg = f"container {container_id[:SHORT]} is not known to handler {self.name!r}"
            raise NotFound(msg)
        return container

    async def aclose(self) -> None:
        """End all modules, which cannot outlive the daemon; the next one reports them."""
        self._closing = True
        await self._cache.aclose()
        running = [container for container in self._containers.values() if container.running]
        for container in running:
            if container.guest is not None:
                container.guest.stop(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                for container in running:
                    await container.ended.wait()
        await asyncio.to_thread(self._throttle.close)
        await asyncio.to_thread(self._pump.close)


class _News:
    """`handlers.wasmtime.guest.Told`: from the guest's threads into the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, container: _Container, ended: Callable[[Exit], None]) -> None:
        self._loop = loop
        self._container = container
        self._ended = ended
        self.start: asyncio.Future[int] = loop.create_future()

    def started(self, at: int) -> None:
        self._later(lambda: self._take_start(at))

    def failed(self, error: CriShimError) -> None:
        self._later(lambda: self._take_failure(error))

    def ended(self, ended: Exit) -> None:
        self._later(lambda: self._ended(ended))

    def _take_start(self, at: int) -> None:
        if not self.start.done():  # whoever asked for it may have left
            self.start.set_result(at)

    def _take_failure(self, error: CriShimError) -> None:
        self._container.guest = None
        if not self.start.done():
            self.start.set_exception(error)

    def _later(self, tell: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(tell)


def _adjust(guest: Guest, spec: GuestSpec) -> None:
    try:
        guest.adjust(spec)
    except OSError as error:
        msg = f"linux.resources.cpu_shares and cpuset_cpus: the kernel refuses them for the module: {error.strerror}"
        raise FailedPrecondition(msg) from error


def _lost(message: str) -> Exit:
    return Exit(code=_LOST, at=time.time_ns(), reason=Reason.UNKNOWN, message=message)


def _remove(bundle: Path) -> None:
    preopens.dismantle(bundle / _WORK)
    (bundle / _SPEC).unlink(missing_ok=True)


def _refuse_exec() -> NoReturn:
    msg = "Exec and ExecSync into a Wasm container are not supported yet"
    raise Unimplemented(msg, hint="a later version will run another instance of the module")
