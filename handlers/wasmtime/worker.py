"""A worker: the process of one container, forked by a zygote that has imported this module. Not for the daemon.

    go ─▶ cgroup, network, mounts ─▶ link: module, log, directories ─▶ chroot, become the user ─▶ run ─▶ exit file

The daemon makes its cgroup before `go`, and talks to it by one datagram per request and answer (JSON); a later
daemon connects anew. The worker outlives both. It has a thread for the daemon, which never waits for a file, one for
the log, which may, and the guest's. Each page that it writes to it has a copy of, and Python writes to
whatever it calls, looks up or makes: so what can be made before the fork is, and what comes after is plain. Invariant:
when the guest's first instruction runs, the process has the container's identity and no way back; when the exit file is
complete, the guest's last byte is in the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from cri_shim.adapters.log_pump import LogPump
from cri_shim.kernel import credentials, libc, tty
from cri_shim.model.container import Exit, Reason
from cri_shim.model.errors import CriShimError, FailedPrecondition
from cri_shim.model.ids import ContainerId, Digest
from handlers.wasmtime.core_module import link_module, link_prepared, prepare
from handlers.wasmtime.ending import shorten
from handlers.wasmtime.engine import Made, new_engine, new_linker
from handlers.wasmtime.guest import Guest, Program, Services, start_thread
from handlers.wasmtime.guest_spec import DEFAULT_FUNCTION, OPENING_SECONDS, Entry, GuestSpec, WorkerSpec
from handlers.wasmtime.lookup_files import furnish
from handlers.wasmtime.output import Plain, Terminal
from handlers.wasmtime.quota import Throttle

MESSAGE: Final = 1 << 16
_WORDS: Final = 4096
"""Characters of the cause of an error, and of its hint: of which there may be two in a message, at six bytes each."""
SPECS: Final = msgspec.json.Decoder(GuestSpec)
_EXITS: Final = msgspec.json.Encoder()
_STOP_SECONDS: Final = 0.002
"""How long a stopped guest has to end by itself. A component in a call of the engine's host does not."""
_DRAIN_SECONDS: Final = 1.0
"""How long what such a guest has written may take to get into the log, and any guest's if the log hangs."""
_SIGKILL: Final = 128 + 9
_ENDING_KEYS: Final = (signal.SIGINT, signal.SIGQUIT)
"""What a terminal sends for Ctrl-C and Ctrl-\\."""
_APPLET_MEMORY: Final = 256 << 20
"""Bytes, whatever a volume has in it: where the module is a thread, no limit of the container's holds for others."""
_CANNOT_EXECUTE: Final = 126
"""As of a shell."""


def run(arguments: Mapping[str, Any], fds: Sequence[int]) -> NoReturn:
    """Arguments: `id`, `spec` (a `GuestSpec`, JSON), `compiled` (a path), `empty` (a directory to be shut up in),
    `cgroups` (`ProcessCgroups.doors`).

    Descriptors: the daemon's connection, the listening socket, the exit file, and the network namespace if it is not
    the host's.
    """
    spec = SPECS.decode(arguments["spec"])
    if spec.worker is None:
        msg = "no worker was asked for"
        raise ValueError(msg)
    daemon, listener, exit_fd, *namespaces = fds
    os.setsid()
    worker, guest, empty = _PREPARED.worker, _PREPARED.guest, arguments["empty"]
    worker.begin(daemon, listener, exit_fd)
    worker.spec, worker.empty = spec.worker, empty
    try:
        for file in arguments["cgroups"]:
            move_into(file)
        _enter(spec, spec.worker, namespaces, empty)
    except OSError as error:
        worker.failed(FailedPrecondition(f"cannot make the Wasm worker: {error}"))
    guest.assign(arguments["id"], spec, arguments["compiled"], _program(spec) or _PREPARED.program)
    if spec.terminal:
        worker.obey_terminal()
    worker.serve(guest, _PREPARED.pump)


def run_exec(arguments: Mapping[str, Any], fds: Sequence[int]) -> NoReturn:
    """A further process of a container: arguments as of `run`. The process ends as the module does.

    With `applet` (`applets.facts.Facts`, JSON) it runs that and no module.

    Descriptors: a pipe that says go, the three standard streams, and the network namespace if it is not the host's.
    """
    spec = SPECS.decode(arguments["spec"])
    go, stdin, stdout, stderr, *namespaces = fds
    os.setsid()
    for number, fd in enumerate((stdin, stdout, stderr)):
        os.dup2(fd, number)
        os.close(fd)
    if spec.terminal:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        tty.make_own(os.dup(0))
    if spec.worker is None or not os.read(go, 1):
        os._exit(_SIGKILL)  # the daemon has gone
    os.close(go)
    executed = _Executed(spec.worker, arguments["empty"])
    try:
        _enter(spec, spec.worker, namespaces, arguments["empty"])
        if "applet" in arguments:
            _run_applet(spec, arguments["applet"], executed)
    except OSError as error:
        executed.failed(FailedPrecondition(f"cannot make the process: {error}"))
    throttle = Throttle()
    if spec.cpu is not None:
        throttle.start()
    services = Services(
        LogPump(), throttle, executed, executed.shut_up, streams=lambda _: Plain(), made=lambda: _PREPARED.made
    )
    Guest(arguments["id"], spec, arguments["compiled"], services, _program(spec) or link_module).start()
    while True:
        signal.pause()


def _program(spec: GuestSpec) -> Program | None:
    """None for a module."""
    if not spec.entry.component:
        return None
    from handlers.wasmtime.component import link_component  # noqa: PLC0415  in the zygote of components

    return link_component


def _run_applet(spec: GuestSpec, facts: str, executed: _Executed) -> NoReturn:
    """In place of a module."""
    from handlers.wasmtime.applets.facts import Facts  # noqa: PLC0415  no other worker needs any of it
    from handlers.wasmtime.applets.program import prepared  # noqa: PLC0415  likewise

    resource.setrlimit(resource.RLIMIT_DATA, (_APPLET_MEMORY, _APPLET_MEMORY))
    try:
        run = prepared(spec, msgspec.json.decode(facts, type=Facts))
        executed.shut_up()
        os._exit(run())
    except Exception as error:  # noqa: BLE001  whatever it is, it must not look like success
        executed.failed(FailedPrecondition(f"the applet failed: {type(error).__name__}: {error}"))


@dataclass(frozen=True, slots=True)
class _Executed:
    """`handlers.wasmtime.guest.Told`: what is told is how the process ends."""

    spec: WorkerSpec
    empty: str

    def shut_up(self) -> None:
        _shut_up(self.spec, self.empty)

    def started(self, at: int) -> None:
        pass

    def failed(self, error: CriShimError) -> NoReturn:
        with contextlib.suppress(OSError):
            os.write(2, f"{error}\n".encode(errors="replace"))
        os._exit(_CANNOT_EXECUTE)

    def ended(self, ended: Exit) -> None:
        os._exit(ended.code)


def _shut_up(spec: WorkerSpec, empty: str) -> None:
    """When all is open: leave the host's files behind, open no device through what stays, and become the user."""
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    libc.mount_setattr(root, set_attributes=libc.MOUNT_ATTR_NODEV, recursive=True)  # in our mount table alone
    os.close(root)
    os.chroot(empty)
    os.chdir("/")
    credentials.become(spec.uid, spec.gid, spec.groups, spec.capabilities)


def move_into(cgroup: str) -> None:
    """Move this process, by a file that moves the thread which writes to it: there is one."""
    fd = os.open(cgroup, os.O_WRONLY | os.O_CLOEXEC)
    os.write(fd, b"0")
    os.close(fd)


def _enter(spec: GuestSpec, worker: WorkerSpec, namespaces: Sequence[int], empty: str) -> None:
    score = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    os.write(score, b"%d" % worker.oom_score_adj)
    os.close(score)
    for namespace in namespaces:
        libc.setns(namespace, libc.CLONE_NEWNET)
        os.close(namespace)
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount(None, "/", None, libc.MS_SLAVE | libc.MS_REC)  # what the host unmounts is unmounted here too
    if spec.entry.component:
        furnish(worker, Path(empty))


@dataclass(slots=True)
class Worker:
    """`handlers.wasmtime.guest.Told`, and the main thread's loop. Made before the fork, and `begin` comes after it.

    Sockets are plain descriptors: Python's objects of them are for those whom a daemon has something to say to.
    """

    spec: WorkerSpec
    empty: str = ""
    _listener: int = -1
    _exit_fd: int = -1
    _keys: tuple[int, ...] = ()
    """Where a terminal's signals are read from."""
    _clients: set[int] = field(default_factory=set)
    _leaving: threading.Lock = field(default_factory=threading.Lock)
    _forced: Exit | None = None
    _deadline: float = 0.0
    _over: bool = False
    """The log is to end, whatever the guest does."""
    _started: bool = False
    _opening: str = ""
    """What the guest was opening when it was last looked at."""

    def begin(self, daemon: int, listener: int, exit_fd: int) -> None:
        """Wait until the daemon says go. It goes away = so do we."""
        self._listener, self._exit_fd = listener, exit_fd
        self._clients.add(daemon)
        if not os.read(daemon, MESSAGE):
            os._exit(1)

    def shut_up(self) -> None:
        """In the guest's thread."""
        _shut_up(self.spec, self.empty)

    def started(self, at: int) -> None:
        self._started = True
        self._tell(b'{"started": %d}' % at)

    def failed(self, error: CriShimError) -> NoReturn:
        words = type(error).__name__, shorten(error.cause, _WORDS), shorten(error.hint, _WORDS)
        self._tell(json.dumps({"failed": words}).encode())
        os._exit(1)

    def ended(self, ended: Exit) -> None:
        self._leave(ended)

    def obey_terminal(self) -> None:
        """Its signals end the guest, or mean nothing: there is no shell that would go on with what is stopped.

        They are read as numbers: a handler in Python would be called late when the signal comes right before a wait,
        and may find taken what it needs when it comes in the middle of an answer.
        """
        signals, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._keys = (signals,)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _ENDING_KEYS:
            signal.signal(number, lambda _number, _frame: None)
        for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def serve(
        self, guest: Guest, pump: LogPump, thread: Callable[[Callable[[], None]], None] = start_thread
    ) -> NoReturn:
        """Answer the daemon until the guest has ended; in another thread write the log."""
        poller, output = select.poll(), pump.start()
        for fd in (self._listener, *self._keys, *self._clients):
            poller.register(fd, select.POLLIN)
        try:
            guest.start()
            thread(partial(self._write_log, guest, pump, output))
        except CriShimError as error:
            self.failed(error)
        self._deadline = time.monotonic() + OPENING_SECONDS
        while True:
            events = poller.poll(self._patience())
            if time.monotonic() >= self._deadline:
                self._overdue(guest, pump)
            for fd, _ in events:
                if fd in self._keys:
                    self._stop(guest, os.read(fd, 1)[0])
                elif fd == self._listener:
                    with _borrowed(fd) as listener:
                        client = listener.accept()[0].detach()
                    self._clients.add(client)
                    poller.register(client, select.POLLIN)
                else:
                    with _borrowed(fd) as daemon:
                        is_there = self._answer(guest, daemon)
                    if not is_there:
                        poller.unregister(fd)
                        self._clients.remove(fd)
                        os.close(fd)

    def _write_log(self, guest: Guest, pump: LogPump, output: select.epoll) -> None:
        """Until the guest has ended, or until it is over: then what the guest has written is in the log."""
        while not self._over:
            pump.turn(output)
        while pump.turn(output, timeout=0):
            pass
        pump.finish()
        self._leave_without(guest)

    def _answer(self, guest: Guest, client: socket.socket) -> bool:
        """One request; False when the client has gone."""
        try:
            message, fds, _, _ = socket.recv_fds(client, MESSAGE, 1)
        except OSError:
            return False
        if not message:
            return False
        request = json.loads(message)
        if "stop" in request:
            self._stop(guest, request["stop"])
        elif "log" in request and guest.output is not None:
            guest.output.log_to(fds[0], partial(self._tell, b'{"log": true}'))
        elif "tap" in request and guest.output is not None:
            guest.output.tap(socket.socket(fileno=fds[0]))
            self._tell(b'{"tap": true}')
        elif "terminal" in request and isinstance(guest.output, Terminal):
            socket.send_fds(client, [b'{"terminal": true}'], [guest.output.master])
        elif "end_input" in request:
            guest.end_input()
        return True

    def _stop(self, guest: Guest, number: int) -> None:
        if not guest.stop(number):
            return
        if self._forced is None:
            self._forced = Exit(code=128 + number, at=0, reason=Reason.ERROR)
            self._deadline = time.monotonic() + _STOP_SECONDS

    def _patience(self) -> float | None:
        """Milliseconds that there is to wait."""
        if self._forced is None and self._started:
            return None
        return max(0.0, self._deadline - time.monotonic()) * 1000

    def _overdue(self, guest: Guest, pump: LogPump) -> None:
        """What there was time for has not come about."""
        if self._forced is None:
            if self._opening and self._opening == guest.opening:
                self.failed(guest.unopened())
            self._opening, self._deadline = guest.opening, time.monotonic() + OPENING_SECONDS
        elif not self._over:  # nothing ends the guest but the end of the process
            self._over, self._deadline = True, self._deadline + _DRAIN_SECONDS
            pump.call(lambda: None)
        else:  # the log hangs: so may the end of this process
            self._leave_without(guest, b'{"ended": true}')

    def _leave_without(self, guest: Guest, news: bytes = b"") -> None:
        """Without having been told that all is in the log."""
        if self._forced is not None:
            self._leave(guest.exit or msgspec.structs.replace(self._forced, at=time.time_ns()), news)

    def _leave(self, ended: Exit, news: bytes = b"") -> None:
        """Once; whoever comes second has nothing to say any more."""
        with self._leaving:
            os.write(self._exit_fd, _EXITS.encode(ended))
            if news:
                self._tell(news)
            os._exit(0)

    def _tell(self, news: bytes) -> None:
        for client in tuple(self._clients):
            with contextlib.suppress(OSError):
                os.write(client, news)


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket whose descriptor stays open."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


@dataclass(frozen=True, slots=True)
class Prepared:
    """For the one guest of a worker, whatever it will run. `program` is for a core module."""

    worker: Worker
    guest: Guest
    pump: LogPump
    program: Program
    made: Made
    held: contextlib.ExitStack


def _services(worker: Worker, pump: LogPump, made: Made) -> Services:
    return Services(pump, Throttle(), worker, worker.shut_up, made=lambda: made)


def prepare_worker(services: Callable[[Worker, LogPump, Made], Services] = _services) -> Prepared:
    """In the zygote. A fork takes it all along as long as no thread of the engine's runs."""
    engine = new_engine()
    linker = new_linker(engine)
    made = Made(engine, lambda _: linker)
    worker, pump, held = Worker(NOBODY), LogPump(threaded=False), contextlib.ExitStack()
    guest = Guest(ContainerId(""), NOTHING, "", services(worker, pump, made), link_module)
    program = partial(link_prepared, prepare(guest, held))
    _EXITS.encode(Exit(code=0, at=0, reason=Reason.COMPLETED))
    return Prepared(worker, guest, pump, program, made, held)


NOBODY: Final = WorkerSpec(
    why="",
    uid=0,
    gid=0,
    groups=(),
    capabilities=(),
    oom_score_adj=0,
    netns="",
    cgroup_parent="",
    limits={},
)
NOTHING: Final = GuestSpec(
    entry=Entry("", Digest(""), DEFAULT_FUNCTION),
    argv=(),
    env=(),
    preopens=(),
    memory_limit=0,
    cpu=None,
    nice=0,
    cpus=(),
    log_path="",
)
"""Until it is known what runs."""
libc.share_heap()  # of its own each thread would touch 80 KiB
_PREPARED: Final = prepare_worker()
