"""One run of one module: a thread, an engine of its own, and how it is stopped.

    start() ─▶ prepare ──failed──▶ told.failed
                  └──▶ told.started ─▶ run ─▶ close the store ─▶ pipes drained ─▶ told.ended

Not a container: the handler keeps that. Invariant: after `told.started`, `told.ended` follows exactly once, when the
guest's last byte is in the log. What ended it is read from this object, never from an exception.
"""

from __future__ import annotations

import _thread
import os
import signal as signals
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import wasmtime

from cri_shim.adapters.log_pump import LogPump
from cri_shim.kernel import libc
from cri_shim.model.container import Exit, Reason
from cri_shim.model.errors import CriShimError, DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted
from cri_shim.model.ids import ContainerId
from handlers.wasmtime.ending import Ending, exit_from, shorten
from handlers.wasmtime.engine import Made, make
from handlers.wasmtime.guest_spec import GuestSpec
from handlers.wasmtime.meter import Meter
from handlers.wasmtime.output import Output, Plain, Streams, Terminal, streams_of
from handlers.wasmtime.quota import Allowance, CpuLimit, Throttle
from handlers.wasmtime.socket_calls import Calls
from handlers.wasmtime.stopping import Stopping
from handlers.wasmtime.turns import Turns

_STACK: Final = 2 << 20
"""Bytes: the engine's limit for Wasm frames, and as much again for the calls into the host that they end in."""
_NOT_OPENED: Final = "failed to open file"
"""The engine's words when it is not the content that is wrong."""
_LONGEST_PAUSE: Final = 0.1
"""Seconds."""

_stack_size_lock = threading.Lock()


def start_thread(run: Callable[[], None]) -> None:
    """A thread that may run Wasm. ResourceExhausted when there can be no more."""
    with _stack_size_lock:
        before = threading.stack_size(_STACK)
        try:
            # Not threading.Thread: its start waits until the thread runs, which a busy machine makes long.
            _thread.start_new_thread(run, ())
        except RuntimeError:
            msg = "cannot start a thread for the Wasm module"
            raise ResourceExhausted(msg, hint="raise TasksMax of the service, or run fewer containers") from None
        finally:
            threading.stack_size(before)


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


class Waits(Protocol):
    """Where a guest waits for more than time. Any thread."""

    def stop(self) -> None:
        """End every wait, now and from now on."""
        ...

    def close_listeners(self) -> None:
        """End what it listens on."""
        ...


class Weight(Protocol):
    """What keeps the thread that calls from taking too much of the CPU."""

    def weigh(self, thread: int, shares: int) -> None:
        """What a thread asks for that is about to enter, or has: CPU shares, 0 = it does not say."""
        ...

    def enter(self) -> object:
        """The guest is about to run."""
        ...

    def leave(self) -> None:
        """It has ended."""
        ...

    def hurry(self, thread: int) -> None:
        """Let another thread, which is in there, come to its end before the others. Any thread."""
        ...


class _OwnProcess:
    def weigh(self, thread: int, shares: int) -> None:
        pass

    def enter(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def hurry(self, thread: int) -> None:
        pass


_OWN_PROCESS: Final = _OwnProcess()


@dataclass(frozen=True, slots=True)
class Services:
    """What a guest uses of its surroundings."""

    pump: LogPump
    throttle: Throttle
    told: Told
    ready: Callable[[], None] = lambda: None
    """Called by the guest's thread when all that it needs is open, before its first instruction."""
    weight: Weight | None = None
    """None = the guest has its process for itself."""
    streams: Callable[[GuestSpec], Streams] = streams_of
    """Opens the output."""
    thread: Callable[[Callable[[], None]], None] = start_thread
    """Runs the guest, in a thread that may run Wasm."""
    made: Callable[[], Made] = make


@dataclass(frozen=True, slots=True)
class Linked:
    """A program that can run: `execute` does, to the end."""

    store: wasmtime.Store
    output: Streams
    execute: Callable[[], Ending]


class Guest:
    """One run. `start`, `stop` and `adjust` may be called from any thread; the rest is for the guest's own one.

    `program` links what is to run, and knows how.
    """

    def __init__(
        self, container_id: ContainerId, spec: GuestSpec, compiled: str, services: Services, program: Program
    ) -> None:
        self.assign(container_id, spec, compiled, program)
        self._pump = services.pump
        self._throttle = services.throttle
        self._told = services.told
        self._ready = services.ready
        self._streams = services.streams
        self._start_thread = services.thread
        self._weight = services.weight or _OWN_PROCESS
        self._allowance: Allowance | None = None
        self._pause_until = 0
        made = services.made()
        self.engine = made.engine
        self.new_linker = made.linker
        self._stopping = Stopping()
        self._has_begun = False
        """What it is told by is there."""
        self.signal: int | None = None
        self.code: int | None = None
        self.defect = ""
        self._thread = 0
        self._thread_lock = threading.Lock()
        self._exit = Exit(code=0, at=0, reason=Reason.UNKNOWN)
        self.output: Output | Terminal | None = None
        self.opening = ""
        """What it is about to open."""
        self._keeper = -1
        self.socket_calls: Calls | None = None
        self.waits: Waits | None = None
        self.meter = Meter()
        self._turns = Turns(self.sleep)
        self.clock_base = 0
        self.limit_memory: Callable[[GuestSpec], None] = _no_memory
        self._memory_limit_changed = False

    def assign(self, container_id: ContainerId, spec: GuestSpec, compiled: str, program: Program) -> None:
        """Before `start`, it is that container's: a worker's guest is made before anybody knows whose it will be."""
        self._id = container_id
        self.spec = spec
        self.compiled = compiled
        self._program = program
        self.has_input = bool(spec.stdin) or spec.terminal

    def start(self) -> None:
        """Start the thread. ResourceExhausted when there can be no more threads."""
        self._start_thread(self._run)

    def stop(self, signal: int) -> bool:
        """End the guest, whatever it does; whether that is at once. The first signal counts. Ended already is success.

        A graceful guest that has begun is only told, by the end of its input and of what it listens on, if it has
        them; SIGKILL ends it as any other.
        """
        if self.spec.graceful and signal != signals.SIGKILL and self._has_begun:
            self.end_input()
            if self.waits is not None:
                self.waits.close_listeners()
            return False
        if self.signal is None:
            self.signal = signal
        self._stopping.set()
        # After the flag, which `_execute` reads when the deadline is set: one of the two always sees the other. Before
        # what wakes it: no instruction of its own is to follow.
        self.engine.increment_epoch()
        with self._thread_lock:
            if self._thread:
                self._weight.hurry(self._thread)
        if self.output is not None:
            self.output.let_go()  # or for somebody who takes its output
        self.end_input()  # it may be waiting for some
        if self.waits is not None:
            self.waits.stop()
        return True

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
            self._weight.weigh(self._thread, spec.shares)
            self._limit_cpu(spec.cpu)
            memory_limit, self.spec = self.spec.memory_limit, spec
            if memory_limit != spec.memory_limit:
                # Only its own thread may touch the store: it does so before it computes on.
                self._memory_limit_changed = True
                self.engine.increment_epoch()

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
            self.engine.increment_epoch()

    def unopened(self) -> CriShimError:
        """It could not be started, as it is still `opening` something."""
        msg = f"{self.opening} cannot be opened: the file system does not answer"
        return DeadlineExceeded(msg, hint="the module has not run; create the container again when it does")

    @property
    def exit(self) -> Exit | None:
        """How it has ended; it may be that not all of its output is in the log yet."""
        return self._exit if self._exit.at else None

    @property
    def is_stopping(self) -> bool:
        """It has been told to stop."""
        return self._stopping.is_set

    def leave(self, code: int) -> None:
        """`HookedGuest`."""
        self.code = code

    def sleep(self, seconds: float) -> bool:
        """`HookedGuest`."""
        if seconds <= 0 or self._stopping.is_set:
            return self._stopping.is_set
        with self.resting():
            return self._stopping.wait(seconds)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """The guest waits in the block, and uses no CPU time."""
        if self._allowance is None:
            yield
            return
        self._throttle.rests(self)
        try:
            yield
        finally:
            self._throttle.computes(self)

    def pause(self) -> bool:
        """`HookedGuest`."""
        if self._memory_limit_changed:
            self._memory_limit_changed = False
            self.limit_memory(self.spec)
        while not self._stopping.is_set:
            rest = self._pause_until - time.monotonic_ns()
            if rest <= 0:
                return False
            # In pieces: the limit may be lifted meanwhile.
            self._stopping.wait(min(rest / 1e9, _LONGEST_PAUSE))
        return True

    def fail(self, error: Exception) -> None:
        """`HookedGuest`."""
        self.defect = f"internal error in a host function: {type(error).__name__}: {error}"

    def called(self, *, useful: bool) -> bool:
        """`HookedGuest`."""
        return self._turns.called(useful=useful)

    def _run(self) -> None:
        with ExitStack() as resources:
            self.meter.begin()
            resources.callback(self.meter.end)
            resources.callback(self._throttle.rests, self)
            self._name_thread(threading.get_native_id())
            resources.callback(self._name_thread, 0)
            try:
                # Not by its file in /proc: what the kernel keeps of that holds up the end of a process.
                libc.name_thread(f"wasm-{self._id[:10]}".encode())
                linked = self._program(self, resources)
                self._ready()
                _become_gentle(self.spec)
            except Exception as error:  # noqa: BLE001  a start that fails for any reason is told to the client
                failure = self._start_error(error)
                failure.__cause__ = failure.__context__ = None  # their frames hold the module until a collection
                self._told.failed(failure.with_traceback(None))
                return
            self._has_begun = True
            self._told.started(time.time_ns())
            if self.spec.cpu is not None:
                self._limit_cpu(self.spec.cpu)
            with self._thread_lock:
                self._weight.weigh(self._thread, self.spec.shares)
            # Last of all: in there it waits for its turn, with whatever others need that it holds.
            self._weight.enter()
            ending = linked.execute()
            self._weight.leave()  # what follows is the daemon's work, and others may wait for it
            if self.waits is not None:
                self.waits.close_listeners()  # before the end is told, as the port is wanted again then
            self._exit = exit_from(ending, time.time_ns())
            self.meter.end()
            if self.socket_calls is not None:
                self.socket_calls.sockets.close()  # before the end is told: the next container has these ports
            linked.store.close()  # and with it the engine's ends of the pipes
            if ending.trap and ending.signal is None:
                linked.output.say(ending.trap)

    def _name_thread(self, native_id: int) -> None:
        with self._thread_lock:
            self._thread = native_id

    def _drained(self) -> None:
        self._told.ended(self._exit)

    def wait_in(self, waits: Waits) -> None:
        """It waits there from now on."""
        self.waits = waits
        if self.is_stopping:
            waits.stop()

    def give_files(self, take: Callable[[Streams], None], resources: ExitStack) -> Streams:
        """Log, streams and directories, which `take` opens. The last that can fail: now the pump tells the end."""
        self.opening = f"the container's log {self.spec.log_path}"
        output = self._streams(self.spec)
        resources.callback(output.close)
        self.opening = "the container's mounts"
        self.clock_base = time.monotonic_ns()  # the engine's monotonic clock starts with its WASI configuration
        if self.spec.stdin and isinstance(output, Output):
            # Also a writer: no client that comes and goes ends the input.
            self._keeper = os.open(self.spec.stdin, os.O_RDWR | os.O_CLOEXEC)
            resources.callback(self.end_input)
        take(output)
        self.opening = ""
        output.hand_over(self._pump, self._drained)
        if not isinstance(output, Plain):
            self.output = output
        return output

    def end_input(self) -> None:
        """The guest reads end-of-file when nobody else has the FIFO open for writing. A second call does nothing."""
        if isinstance(self.output, Terminal):
            self.output.end_input()
        with self._thread_lock:
            fd, self._keeper = self._keeper, -1
        if fd >= 0:
            os.close(fd)

    def _start_error(self, error: Exception) -> CriShimError:
        if isinstance(error, CriShimError):
            return error
        if isinstance(error, OSError):
            return FailedPrecondition(f"cannot start the Wasm module: {error}")
        if isinstance(error, wasmtime.WasmtimeError):
            return FailedPrecondition(f"the engine cannot run it: {one_line(error)}")
        return Internal(f"cannot start the Wasm module: {type(error).__name__}: {error}")

    def unusable(self, error: wasmtime.WasmtimeError) -> CriShimError:
        """What was compiled cannot be loaded: the next start compiles it again."""
        text = one_line(error)
        if not text.startswith(_NOT_OPENED):
            Path(self.compiled).unlink(missing_ok=True)
        msg = f"the compiled form of the module cannot be used: {text}"
        return FailedPrecondition(msg, hint="create the container again, and it is compiled if need be")


Program = Callable[[Guest, ExitStack], Linked]
"""Links what is to run, all that can fail for reasons that are not its own doing; what it enters is left at the end."""


def _no_memory(spec: GuestSpec) -> None:
    """It has none of its own to be limited, but a cgroup, or has not been linked."""


def one_line(error: Exception) -> str:
    """The engine's words, which come with line breaks, and with names of the module's that may be 100 kB long."""
    return shorten(" ".join(str(error).split()))


def _become_gentle(spec: GuestSpec) -> None:
    """The calling thread gives way to the others of the daemon. On Linux all of this is per thread.

    FailedPrecondition where it may run on none of the CPUs that it is given.
    """
    if spec.worker is not None:
        return  # its cgroup says what it may take
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(spec.nice)
    if spec.cpus:
        try:
            os.sched_setaffinity(0, spec.cpus)
        except OSError as error:
            msg = f"linux.resources.cpuset_cpus: the kernel refuses them for the module: {error.strerror}"
            raise FailedPrecondition(msg, hint="name some that this node has and the daemon may use") from error
