"""One run of one module: a thread, an engine of its own, and how it is stopped.

    start() ─▶ prepare ──failed──▶ told.failed
                  └──▶ told.started ─▶ run ─▶ close the store ─▶ pipes drained ─▶ told.ended

Not a container: the handler keeps that. Invariant: after `told.started`, `told.ended` follows exactly once, when the
guest's last byte is in the log. What ended it is read from this object, never from an exception.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import wasmtime

from cri_shim.adapters.log_pump import LogPump
from cri_shim.model.container import Exit, Reason
from cri_shim.model.errors import CriShimError, FailedPrecondition, Internal, ResourceExhausted
from cri_shim.model.ids import ContainerId
from handlers.wasmtime.ending import Ending, exit_from
from handlers.wasmtime.engine import new_engine
from handlers.wasmtime.guest_spec import DEFAULT_FUNCTION, GuestSpec
from handlers.wasmtime.hooks import hooked
from handlers.wasmtime.meter import Meter
from handlers.wasmtime.output import Output
from handlers.wasmtime.quota import Allowance, CpuLimit, Throttle
from handlers.wasmtime.wasi import wasi_config

_STACK: Final = 2 << 20
"""Bytes: the engine's limit for Wasm frames, and as much again for the calls into the host that they end in."""
_INITIALIZE: Final = "_initialize"
_PAGE: Final = 64 * 1024
_ABOVE_LIMIT: Final = "exceeds memory limits"
"""The engine's words when a module asks for more memory from the start than the store's limit."""
_NOT_OPENED: Final = "failed to open file"
"""The engine's words when it is not the content that is wrong."""
_LONGEST_PAUSE: Final = 0.1
"""Seconds."""
_TABLES: Final = 4
_TABLE_ELEMENTS: Final = 10_000_000
_FEW_ELEMENTS: Final = 10_000

_stack_size_lock = threading.Lock()


class Told(Protocol):
    """Where news go. Called in other threads than the event loop's, and must not block."""

    def started(self, at: int) -> None:
        """The module is linked and about to run. Unix time, ns."""
        ...

    def failed(self, error: CriShimError) -> None:
        """It could not be started."""
        ...

    def ended(self, ended: Exit) -> None:
        """It has ended and its output is in the log."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """What a guest uses of its surroundings."""

    pump: LogPump
    throttle: Throttle
    told: Told
    ready: Callable[[], None] = lambda: None
    """Called by the guest's thread when all that it needs is open, before its first instruction."""


@dataclass(frozen=True, slots=True)
class _Linked:
    """A module that can run. `initialize`: it is a library, to be initialised before a function is called."""

    store: wasmtime.Store
    module: wasmtime.InstancePre
    output: Output
    initialize: bool


class Guest:
    """`start`, `stop` and `adjust` may be called from any thread; the rest is for the guest's own one and its hooks."""

    def __init__(self, container_id: ContainerId, spec: GuestSpec, compiled: Path, services: Services) -> None:
        self._id = container_id
        self._spec = spec
        self._compiled = compiled
        self._pump = services.pump
        self._throttle = services.throttle
        self._told = services.told
        self._ready = services.ready
        self._allowance: Allowance | None = None
        self._pause_until = 0
        self._engine = new_engine()
        self._stopping = threading.Event()
        self._signal: int | None = None
        self._code: int | None = None
        self._defect = ""
        self._thread = 0
        self._thread_lock = threading.Lock()
        self._exit = Exit(code=0, at=0, reason=Reason.UNKNOWN)
        self.output: Output | None = None
        self.meter = Meter()
        self.clock_base = 0

    def start(self) -> None:
        """Start the thread. ResourceExhausted when there can be no more threads."""
        with _stack_size_lock:
            before = threading.stack_size(_STACK)
            try:
                # Not threading.Thread: its start waits until the thread runs, which a busy machine makes long.
                _thread.start_new_thread(self._run, ())
            except RuntimeError:
                msg = "cannot start a thread for the Wasm module"
                raise ResourceExhausted(msg, hint="raise TasksMax of the service, or run fewer containers") from None
            finally:
                threading.stack_size(before)

    def stop(self, signal: int) -> None:
        """End the guest, whatever it does. The first signal counts. Ended already is success."""
        if self._signal is None:
            self._signal = signal
        self._stopping.set()
        # After the flag, which `_execute` reads when the deadline is set: one of the two always sees the other.
        self._engine.increment_epoch()

    def adjust(self, spec: GuestSpec) -> None:
        """Change what the thread may take to what `spec` says. OSError when the kernel refuses; ended is success."""
        with self._thread_lock:
            if not self._thread:
                return
            before = os.sched_getaffinity(self._thread)
            os.sched_setaffinity(self._thread, spec.cpus or os.sched_getaffinity(os.getpid()))
            try:
                os.setpriority(os.PRIO_PROCESS, self._thread, spec.nice)
            except OSError:
                os.sched_setaffinity(self._thread, before)
                raise
            self._limit_cpu(spec.cpu)

    def _limit_cpu(self, limit: CpuLimit | None) -> None:
        if limit is None:
            self._allowance, self._pause_until = None, 0
            self._throttle.rests(self)
        else:
            self._allowance = Allowance(limit, time.monotonic_ns(), self.meter.cpu_ns())
            self._throttle.computes(self)

    def account(self, now: int) -> None:
        """`Limited`."""
        allowance = self._allowance
        if allowance is None or now < self._pause_until:
            return
        debt = allowance.debt(now, self.meter.cpu_ns())
        if debt:
            self._pause_until = now + debt
            self._engine.increment_epoch()

    def leave(self, code: int) -> None:
        """`HookedGuest`."""
        self._code = code

    def sleep(self, seconds: float) -> bool:
        """`HookedGuest`."""
        if seconds <= 0 or self._stopping.is_set():
            return self._stopping.is_set()
        if self._allowance is None:
            return self._stopping.wait(seconds)
        self._throttle.rests(self)
        try:
            return self._stopping.wait(seconds)
        finally:
            self._throttle.computes(self)

    def pause(self) -> bool:
        """`HookedGuest`."""
        while not self._stopping.is_set():
            rest = self._pause_until - time.monotonic_ns()
            if rest <= 0:
                return False
            # In pieces: the limit may be lifted meanwhile.
            self._stopping.wait(min(rest / 1e9, _LONGEST_PAUSE))
        return True

    def fail(self, error: Exception) -> None:
        """`HookedGuest`."""
        self._defect = f"internal error in a host function: {type(error).__name__}: {error}"

    def _run(self) -> None:
        with ExitStack() as resources:
            self.meter.begin()
            resources.callback(self.meter.end)
            resources.callback(self._throttle.rests, self)
            self._name_thread(threading.get_native_id())
            resources.callback(self._name_thread, 0)
            try:
                linked = self._link(resources)
                self._ready()
            except Exception as error:  # noqa: BLE001  a start that fails for any reason is told to the client
                failure = self._start_error(error)
                failure.__cause__ = failure.__context__ = None  # their frames hold the module until a collection
                self._told.failed(failure.with_traceback(None))
                return
            self._told.started(time.time_ns())
            if self._spec.cpu is not None:
                self._limit_cpu(self._spec.cpu)
            ending = self._execute(linked)
            self._exit = exit_from(ending, time.time_ns())
            self.meter.end()
            linked.store.close()  # and with it the engine's ends of the pipes
            if ending.trap and ending.signal is None:
                linked.output.say(ending.trap)

    def _name_thread(self, native_id: int) -> None:
        with self._thread_lock:
            self._thread = native_id

    def _drained(self) -> None:
        self._told.ended(self._exit)

    def _link(self, resources: ExitStack) -> _Linked:
        """All that can fail for reasons that are not the module's own doing at run time."""
        _become_gentle(self._spec, self._id)
        module = self._load()
        linker = wasmtime.Linker(self._engine)
        linker.allow_shadowing = True
        linker.define_wasi()
        watch_epoch = resources.enter_context(hooked(self, linker))
        linked = linker.instantiate_pre(module)
        initialize = self._check_exports(module)
        store = wasmtime.Store(self._engine)
        self._set_limits(store)
        watch_epoch(store)
        output = Output(self._spec.log_path)
        resources.callback(output.close)
        self.clock_base = time.monotonic_ns()  # the engine's monotonic clock starts with its WASI configuration
        store.set_wasi(wasi_config(self._spec, output))
        output.hand_over(self._pump, self._drained)  # last: from here on the pump tells the end
        self.output = output
        return _Linked(store, linked, output, initialize)

    def _load(self) -> wasmtime.Module:
        try:
            return wasmtime.Module.deserialize_file(self._engine, str(self._compiled))
        except wasmtime.WasmtimeError as error:
            text = _one_line(error)
            if not text.startswith(_NOT_OPENED):
                self._compiled.unlink(missing_ok=True)
            msg = f"the compiled form of the module cannot be used: {text}"
            raise FailedPrecondition(msg, hint="create the container again, and it is compiled if need be") from None

    def _check_exports(self, module: wasmtime.Module) -> bool:
        """Whether there is something to initialise. FailedPrecondition when there is nothing to call."""
        wanted = self._spec.entry.function
        functions = {export.name: export.type for export in module.exports}
        signature = functions.get(wanted)
        if not isinstance(signature, wasmtime.FuncType):
            msg = f"the module exports no function {wanted!r}"
            raise FailedPrecondition(msg, hint="command[0] may name another one, as in module.wasm#function")
        if signature.params:
            msg = f"the module's function {wanted!r} takes parameters, which a container has none of"
            raise FailedPrecondition(msg)
        return wanted != DEFAULT_FUNCTION and isinstance(functions.get(_INITIALIZE), wasmtime.FuncType)

    def _set_limits(self, store: wasmtime.Store) -> None:
        limit = self._spec.memory_limit
        store.set_limits(
            memory_size=limit or -1,
            table_elements=max(_FEW_ELEMENTS, limit // 128) if limit else _TABLE_ELEMENTS,
            instances=1,
            tables=_TABLES,
            memories=1,
        )

    def _execute(self, linked: _Linked) -> Ending:
        """Run to the end, which is told by this object's fields; the exception has only the engine's words."""
        store, memory, trap = linked.store, None, ""
        if self._stopping.is_set():
            return Ending(signal=self._signal)
        try:
            exports = linked.module.instantiate(store).exports(store)
            memory = exports.get("memory")
            self.meter.attach(store, memory)
            if linked.initialize:
                _call(store, exports[_INITIALIZE])
            _call(store, exports[self._spec.entry.function])
        except Exception as error:  # noqa: BLE001  a container ends, whatever ended it
            trap = self._defect or str(error).strip() or type(error).__name__
            error.with_traceback(None)  # its frames hold it, and with it the module until a collection
        if self._code is not None:
            return Ending(code=self._code, out_of_memory=bool(self._code) and self._is_full(store, memory))
        if not trap:
            return Ending()
        return Ending(
            signal=self._signal, trap=trap, out_of_memory=_ABOVE_LIMIT in trap or self._is_full(store, memory)
        )

    def _is_full(self, store: wasmtime.Store, memory: object) -> bool:
        """Whether the memory is so near its limit that the guest could not grow it by much.

        The engine does not say that it refused to grow; an allocator asks for some pages more at a time.
        """
        limit = self._spec.memory_limit
        return (
            bool(limit) and isinstance(memory, wasmtime.Memory) and memory.data_len(store) > limit - limit // 8 - _PAGE
        )

    def _start_error(self, error: Exception) -> CriShimError:
        if isinstance(error, CriShimError):
            return error
        if isinstance(error, OSError):
            return FailedPrecondition(f"cannot start the Wasm module: {error}")
        if isinstance(error, wasmtime.WasmtimeError):
            return FailedPrecondition(f"the module cannot be linked: {_one_line(error)}")
        return Internal(f"cannot start the Wasm module: {type(error).__name__}: {error}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _call(store: wasmtime.Store, function: object) -> None:
    if isinstance(function, wasmtime.Func):  # `_check_exports` has seen it
        function(store)


def _become_gentle(spec: GuestSpec, container_id: ContainerId) -> None:
    """Name the calling thread; in the daemon it gives way to the others. On Linux all of this is per thread."""
    comm = os.open("/proc/thread-self/comm", os.O_WRONLY | os.O_CLOEXEC)
    os.write(comm, f"wasm-{container_id[:10]}".encode())
    os.close(comm)
    if spec.worker is not None:
        return  # its cgroup says what it may take
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(spec.nice)
    if spec.cpus:
        os.sched_setaffinity(0, spec.cpus)
