"""conmon, one per container: it holds the container's streams, log and exit status, and outlives the daemon.

Not the runtime's other verbs (`cri_shim.adapters.oci_runtime`). Invariant: a container has ended when its conmon has;
how it ended is in the exit file, and where there is none the container is killed and its end is told as unknown.

    launch (thread) ──▶ conmon waits on the start pipe ──▶ own cgroup ──▶ start byte ──▶ runtime create ──▶ sync pipe
                                                                                              │
    Exit ◀── exit file, OOM facts ◀── conmon ended (pidfd) ◀── container ran ◀── runtime start ◀┘
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cri_shim.adapters.cgroups import Cgroups
from cri_shim.adapters.oci_runtime import Enter, OciRuntime
from cri_shim.kernel import pipes, process
from cri_shim.model.container import Exit, Reason
from cri_shim.model.errors import DeadlineExceeded, FailedPrecondition, Internal
from cri_shim.model.ids import ContainerId
from cri_shim.wire import conmon

LOG_MODE: Final = 0o640
_CREATE_SECONDS: Final = 100.0
_GONE_SECONDS: Final = 10.0
_REOPEN_SECONDS: Final = 3.0
_EXECUTE_SECONDS: Final = 0.1
_POLL: Final = 0.001
_TAIL: Final = 1024
_SYNC_LINE: Final = 1 << 16
_OOM_STATUS: Final = 137
# conmon puts /dev/null where a container has no stream. crun gives what is behind a stream to root of the user
# namespace, who could then take it away from the whole node; so there it gets a pipe at its end.
_WITHOUT_STDIN: Final = ("/bin/sh", "-c", ': | exec "$0" "$@"')
_WITH_TERMINAL: Final = ("/bin/sh", "-c", ': | exec "$0" "$@" >&2')
_LOST_MESSAGE: Final = "the container's monitor process is gone and left no exit status"


@dataclass(frozen=True, slots=True)
class Files:
    """What conmon and the runtime leave in a bundle."""

    bundle: Path

    @property
    def config(self) -> Path:
        return self.bundle / "config.json"

    @property
    def pid(self) -> Path:
        return self.bundle / "pid"

    @property
    def conmon_pid(self) -> Path:
        return self.bundle / "conmon.pid"

    @property
    def exit(self) -> Path:
        return self.bundle / "exit"

    @property
    def oom(self) -> Path:
        return self.bundle / "oom"

    @property
    def oom_before(self) -> Path:
        """A number, see `Cgroups.unclaimed_oom_kills`."""
        return self.bundle / "oom.before"

    @property
    def control(self) -> Path:
        return self.bundle / "ctl"

    @property
    def log_link(self) -> Path:
        return self.bundle / "log"

    @property
    def attach(self) -> Path:
        return self.bundle / "attach"

    @property
    def runtime_log(self) -> Path:
        return self.bundle / "runtime.log"

    @property
    def conmon_log(self) -> Path:
        return self.bundle / "conmon.log"


@dataclass(frozen=True, slots=True)
class Launch:
    """What conmon needs to know of a container. Its bundle is complete."""

    container_id: ContainerId
    files: Files
    cgroup_parent: str
    log_path: Path | None
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False
    owner: tuple[int, int] | None = None
    """Uid and gid at the host of the first process, in a pod with a user namespace."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A conmon that is about to create its container. `sync` is the read end of its sync pipe."""

    launch: Launch
    child: process.Child
    sync: int


@dataclass(frozen=True, slots=True)
class Supervised:
    """A created container with its monitor.

    `started` (of the first process) tells a reused pid apart, `waiting` is its command line until it executes the
    container's program; empty for an adopted one.
    """

    launch: Launch
    child: process.Child
    pid: int
    started: int
    waiting: bytes = b""


class Monitors:
    """Starts, finds and reads conmons."""

    def __init__(self, program: str, runtime: OciRuntime, cgroups: Cgroups) -> None:
        self._program = program
        self._runtime = runtime
        self._cgroups = cgroups

    def launch(self, launch: Launch, enter: Enter | None) -> Launched:
        """Start conmon, move it into a cgroup of its own and let it go. Blocks: for a thread, with other such work."""
        files = launch.files
        if not os.access(self._runtime.program, os.X_OK):  # conmon would say it in words of its own
            msg = f"program {self._runtime.program} is missing on this node"
            raise FailedPrecondition(msg, hint="install it, or name its path in the configuration")
        if launch.log_path is not None:
            _make_log(launch.log_path)
        with contextlib.ExitStack() as opened:
            sync_read, sync_write = _pipe(opened)
            start_read, start_write = _pipe(opened)
            stderr = os.open(files.conmon_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, stderr)
            child = process.spawn(
                self._arguments(launch),
                stderr=stderr,
                env={**_environment(), "_OCI_SYNCPIPE": str(sync_write), "_OCI_STARTPIPE": str(start_read)},
                # conmon writes `oom` where it stands, whatever the bundle is.
                cwd=files.bundle,
                pass_fds=(sync_write, start_read),
                enter=enter,
            )
            # First of all: recovery finds by it what a killed daemon has left, and a conmon goes at end-of-file too.
            _remember(files.conmon_pid, child.pid)
            self._cgroups.place_monitor(child.pid, launch.cgroup_parent, launch.container_id)
            process.reset_oom_score_adj(child.pid)
            kills = self._cgroups.unclaimed_oom_kills(launch.cgroup_parent, launch.container_id)
            files.oom_before.write_text(str(kills), encoding="ascii")
            os.write(start_write, b"\n")
            return Launched(launch, child, os.dup(sync_read))

    async def created(self, launched: Launched, command: tuple[str, ...]) -> Supervised:
        """Wait until the runtime has created the container. Raises what the runtime said; conmon has ended then."""
        launch = launched.launch
        try:
            async with asyncio.timeout(_CREATE_SECONDS):
                line = await _read_line(launched.sync)
        except TimeoutError:
            msg = f"the runtime did not create the container within {_CREATE_SECONDS:g} s"
            raise DeadlineExceeded(msg) from None
        finally:
            os.close(launched.sync)
        if not line:
            said = await asyncio.to_thread(_tail, launch.files.conmon_log)
            msg = f"conmon ended before it had created the container: {said or 'it said nothing'}"
            raise Internal(msg)
        match conmon.parse_sync(line):
            case conmon.Failed(message):
                raise await self._runtime.create_error(message, launch.files.runtime_log, command)
            case conmon.Created(pid):
                started = process.process_start_time(pid) or 0
                if launch.owner is not None:
                    pipes.give((f"/proc/{pid}/fd/{fd}" for fd in range(3)), launch.owner)
                return Supervised(launch, launched.child.watched(), pid, started, _command_line(pid))

    async def executed(self, supervised: Supervised) -> bool:
        """Whether the first process is seen to run its program: the runtime's `start` returns a moment before.

        False when it is gone already: after a short life, or because the kernel refused to execute the program.
        """
        deadline = time.monotonic() + _EXECUTE_SECONDS
        while time.monotonic() < deadline:
            command = _command_line(supervised.pid)
            if command and command != supervised.waiting:
                return True
            # In the middle of execve(2) a process has no command line, no more than one that is gone.
            if not command and not process.is_alive(supervised.pid, supervised.started):
                return False
            await asyncio.sleep(_POLL)
        return True

    async def ended(self, supervised: Supervised) -> Exit:
        """Wait for the container's end, and say how it was: state, reason and time in one value."""
        await supervised.child.wait()
        return await asyncio.to_thread(self._exit_of, supervised.launch)

    async def adopt(self, launch: Launch) -> Supervised | Exit:
        """Take over a container of an earlier daemon: its monitor if that runs, else the truth of the exit file."""
        found = await asyncio.to_thread(_find_monitor, launch)
        if found is None:
            return await asyncio.to_thread(self._exit_of, launch)
        try:
            pid = int(await asyncio.to_thread(launch.files.pid.read_bytes))
        except (FileNotFoundError, ValueError):
            pid = 0
        return Supervised(launch, found.watched(), pid, process.process_start_time(pid) or 0)

    async def end(self, launch: Launch, child: process.Child | None = None) -> None:
        """Kill the container and wait for its conmon, found by the id when `child` is not known. Gone = success."""
        await asyncio.to_thread(self._cgroups.kill_all, launch.cgroup_parent, launch.container_id)
        monitor = child or await asyncio.to_thread(_find_monitor, launch)
        if monitor is None or monitor.pidfd < 0:
            return
        # One that is still creating has nothing to drain, and would go on to make what was just killed.
        created = await asyncio.to_thread(launch.files.pid.exists)
        if not (created and await _is_gone(monitor, _GONE_SECONDS)):
            monitor.kill()
            await _is_gone(monitor, _GONE_SECONDS)
            await asyncio.to_thread(self._cgroups.kill_all, launch.cgroup_parent, launch.container_id)

    def reopen_log(self, launch: Launch) -> None:
        """Make conmon write to a new file at the log path; on failure no new file is left. Blocks, bounded."""
        path = launch.log_path
        if path is None:
            return
        before = _inode(path)
        try:
            control = os.open(launch.files.control, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            msg = f"the container's monitor does not listen: {error.strerror}"
            raise FailedPrecondition(msg) from error
        try:
            os.write(control, conmon.REOPEN_LOG)
        finally:
            os.close(control)
        deadline = time.monotonic() + _REOPEN_SECONDS
        while _inode(path) in {None, before}:
            if time.monotonic() > deadline:
                if before is None:
                    path.unlink(missing_ok=True)
                msg = f"the container's monitor did not open {path} within {_REOPEN_SECONDS:g} s"
                raise DeadlineExceeded(msg)
            time.sleep(_POLL)
        path.chmod(LOG_MODE)

    def last_words(self, launch: Launch) -> str:
        """The end of the container's log, where a runtime leaves what it could not tell its caller. Blocks."""
        return _tail(launch.log_path) if launch.log_path is not None else ""

    def _exit_of(self, launch: Launch) -> Exit:
        files = launch.files
        try:
            code = conmon.parse_exit(files.exit.read_bytes())
            at = files.exit.stat().st_mtime_ns
        except (FileNotFoundError, Internal) as error:
            self._kill_rest(launch)
            message = str(error) if isinstance(error, Internal) else _LOST_MESSAGE
            return Exit(code=conmon.LOST, at=time.time_ns(), reason=Reason.UNKNOWN, message=message)
        # Before the rest is killed and the cgroup, which has the counter, is removed.
        reason = self._reason(code, launch)
        self._kill_rest(launch)
        return Exit(code=code, at=at, reason=reason)

    def _reason(self, code: int, launch: Launch) -> Reason:
        parent, container_id = launch.cgroup_parent, launch.container_id
        try:
            before = int(launch.files.oom_before.read_bytes())
        except (FileNotFoundError, ValueError):
            before = 0
        # Asked at every end: a kill that is told here is not the next container's.
        killed = self._cgroups.oom_killed_since(parent, container_id, before)
        if code == 0:
            return Reason.COMPLETED
        if code == _OOM_STATUS and (killed or launch.files.oom.exists()):
            return Reason.OOM_KILLED
        return Reason.ERROR

    def _kill_rest(self, launch: Launch) -> None:
        # In a shared PID namespace the children of the first process outlive it.
        self._cgroups.kill_all(launch.cgroup_parent, launch.container_id)

    def _arguments(self, launch: Launch) -> list[str]:
        files, bundle = launch.files, str(launch.files.bundle)
        log = "none" if launch.log_path is None else f"k8s-file:{_log_for_conmon(launch.log_path, files.log_link)}"
        words = [self._program, "--sync", "-c", launch.container_id, "--cuuid", launch.container_id]
        words += ["--name", launch.container_id, "--bundle", bundle, "--persist-dir", bundle, "--exit-dir", bundle]
        words += ["--container-pidfile", str(files.pid), "--log-path", log, "--no-sync-log", "--full-attach"]
        # --systemd-cgroup is among these, and not conmon's own flag: that would come between the wrapper and its `-c`.
        program, *runtime_arguments = [self._runtime.program, *self._runtime.global_arguments(files.runtime_log)]
        if launch.owner is not None and (launch.tty or not launch.stdin):
            wrapper = _WITH_TERMINAL if launch.tty else _WITHOUT_STDIN
            program, *runtime_arguments = [*wrapper, program, *runtime_arguments]
        words += ["--runtime", program, *(f"--runtime-arg={word}" for word in runtime_arguments)]
        flags = {
            "--terminal": launch.tty,
            "--stdin": launch.stdin,
            "--leave-stdin-open": launch.stdin and not launch.stdin_once,
        }
        return words + [flag for flag, wanted in flags.items() if wanted]


def _environment() -> dict[str, str]:
    """What conmon hands on to the runtime, which needs to find its own helpers and nothing else.

    Without a locale conmon takes no argument beyond ASCII, such as the path of a log.
    """
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


def _pipe(opened: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe2(os.O_CLOEXEC)
    for end in ends:
        opened.callback(os.close, end)
    return ends


def _make_log(path: Path) -> None:
    """Made before conmon opens it: conmon would make it 0600, and the kubelet wants it there when Start returns."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, LOG_MODE)
    try:
        os.fchmod(fd, LOG_MODE)
    finally:
        os.close(fd)


def _log_for_conmon(path: Path, link: Path) -> Path:
    """A colon ends the path for conmon: such a one goes by a link."""
    if ":" not in str(path):
        return path
    link.symlink_to(path)
    return link


async def _read_line(fd: int) -> bytes:
    """Up to the first newline or end-of-file."""
    loop = asyncio.get_running_loop()
    os.set_blocking(fd, False)
    readable = asyncio.Event()
    line = bytearray()
    loop.add_reader(fd, readable.set)
    try:
        while len(line) < _SYNC_LINE and not line.endswith(b"\n"):
            await readable.wait()
            readable.clear()
            chunk = os.read(fd, _SYNC_LINE)
            if not chunk:
                break
            line += chunk
    finally:
        loop.remove_reader(fd)
    return bytes(line)


async def _is_gone(child: process.Child, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await child.watched().wait()
    except TimeoutError:
        return False
    return True


def _remember(path: Path, pid: int) -> None:
    path.write_text(f"{pid} {process.process_start_time(pid) or 0}", encoding="ascii")


def _find_monitor(launch: Launch) -> process.Child | None:
    """The conmon of a container that this daemon did not start, by its note or, without one, by its command line."""
    try:
        pid, started = map(int, launch.files.conmon_pid.read_text(encoding="ascii").split())
    except (FileNotFoundError, ValueError):
        pids = process.find_processes(lambda words: _is_monitor(words, launch.container_id))
    else:
        pids = [pid] if process.process_start_time(pid) == started else []
    with contextlib.suppress(ProcessLookupError):
        return process.adopt(pids[0]) if pids else None
    return None


def _is_monitor(words: list[str], container_id: str) -> bool:
    return "-c" in words and words[words.index("-c") + 1 :][:1] == [container_id]


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _command_line(pid: int) -> bytes:
    """Empty for a process that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _tail(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        return file.read(_TAIL).decode(errors="replace").strip()
    return ""
