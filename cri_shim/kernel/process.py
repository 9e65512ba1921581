"""The only module that makes processes: posix_spawn + pidfd + loop reader.

Not for asyncio's own subprocess API (a thread per child before Python 3.12), not for what `preexec_fn` does (a fork
with threads). Invariant: a child that was started here is reaped exactly once, by its pidfd; a child
that nobody asked for is reaped by the `Reaper` and by nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cri_shim.kernel import libc, pidfd, threads
from cri_shim.kernel.pipes import Drain, Feed
from cri_shim.kernel.posix_spawn import posix_spawn
from cri_shim.model.errors import CriShimError, DeadlineExceeded, FailedPrecondition, ResourceExhausted

UNKNOWN_EXIT: Final = -256  # no signal has this number
"""What `Child.wait` returns for a process that is not our child: it is gone, its status went to its own parent."""

_ERROR_TEXT: Final = 500
_LINGER: Final = 0.5
"""Seconds that `run` waits for the pipes' end after the exit: a daemonised grandchild may hold them for ever."""
_REAP_WAIT: Final = 5.0
"""Seconds for a killed process to go: one in an uninterruptible sleep is left to its reader in the loop."""

# A child that answers systemd in the daemon's name, or takes over its sockets, is never wanted. conmon and runc would
# even hand NOTIFY_SOCKET on into the container.
_NOT_INHERITED: Final = frozenset({"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID"})


@dataclass(frozen=True, slots=True)
class Completed:
    """A process that has ended. `returncode` is negative when a signal killed it, as in subprocess."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes

    def text(self) -> str:
        """What it said, fit for an error: the end of stderr (else of stdout), stripped and decoded."""
        said = (self.stderr.strip() or self.stdout.strip()).decode(errors="replace")
        return said if len(said) <= _ERROR_TEXT else f"…{said[-_ERROR_TEXT:]}"


class _Claims:
    """Which children somebody waits for. Children belong to the whole process, so there is one of these."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pids: set[int] = set()
        self._holds = 0
        self.on_change: Callable[[], None] | None = None

    def add(self, pid: int) -> None:
        with self._lock:
            self._pids.add(pid)

    def discard(self, pid: int) -> None:
        with self._lock:
            self._pids.discard(pid)
        self._changed()

    def reapable(self, pid: int) -> bool:
        with self._lock:
            return self._holds == 0 and pid not in self._pids

    @contextlib.contextmanager
    def hold(self) -> Generator[None]:
        with self._lock:
            self._holds += 1
        try:
            yield
        finally:
            with self._lock:
                self._holds -= 1
            self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()


_claims = _Claims()


class Child:
    """A process that we watch: started by `spawn`, or taken over by `adopt`.

    The pidfd closes itself when the process is gone and reads as -1 from then on. Made outside of a loop (in a worker
    thread), the watch starts with the first `wait`.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._loop: asyncio.AbstractEventLoop | None = None
        self._exit: asyncio.Future[int] | None = None
        self.watched()

    def watched(self) -> Child:
        """Start the watch now; for one that was made in another thread."""
        with contextlib.suppress(RuntimeError):  # no loop here: the first `wait` does it
            self._watch()
        return self

    async def wait(self) -> int:
        """The return code, negative for a signal, UNKNOWN_EXIT for a process that never was our child.

        May be awaited by several tasks and again after the exit. RuntimeError after an early `close`.
        """
        return await asyncio.shield(self._watch())

    def kill(self, signal: int = signal.SIGKILL) -> None:
        """Signal the process by its pidfd; one that is gone is success."""
        if self.pidfd >= 0:
            pidfd.send_signal(self.pidfd, signal)

    def close(self) -> None:
        """Stop watching. A process that still runs becomes an orphan: the Reaper's, when it is our child."""
        if self.pidfd < 0:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self.pidfd)
        os.close(self.pidfd)
        self.pidfd = -1
        if self._exit is not None and not self._exit.done():
            self._exit.cancel()
        _claims.discard(self.pid)

    def _watch(self) -> asyncio.Future[int]:
        if self._exit is None:
            if self.pidfd < 0:
                msg = f"process {self.pid} is no longer watched"
                raise RuntimeError(msg)
            self._loop = asyncio.get_running_loop()
            self._exit = self._loop.create_future()
            self._loop.add_reader(self.pidfd, self._on_exit)
        return self._exit

    def _on_exit(self) -> None:
        returncode = _reap(self.pidfd)
        if returncode is None or self._exit is None:
            return
        if not self._exit.done():
            self._exit.set_result(returncode)
        self.close()


def _reap(fd: int) -> int | None:
    """Reap the process of a readable pidfd; None when it has not ended after all."""
    try:
        status = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return UNKNOWN_EXIT
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status


def inherited_environment() -> dict[str, str]:
    """The daemon's environment without what is between it and the service manager."""
    return {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}


_inflight = -1


def set_inflight_fd(fd: int) -> None:
    """The descriptor of the locked in-flight file that short-lived children inherit; -1 for none.

    They share its flock, so that the next daemon knows when the last of them has gone.
    """
    global _inflight  # noqa: PLW0603  set once by the composition root; the children of a process are global anyway
    _inflight = fd


def spawn(  # noqa: PLR0913  Popen's own vocabulary, keywords only
    argv: Sequence[str | Path],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    enter: Callable[[], None] | None = None,
) -> Child:
    """Start a long-lived process; streams that are not given are /dev/null, `env` None is the daemon's own.

    `enter` runs first, in a throw-away thread which then starts the child: it may setns(2) or unshare(2) and the child
    inherits that. It blocks for as long as `enter` does, and until the program is executed: call it from a thread.
    FailedPrecondition when the program is missing, ResourceExhausted when the node has no room for a process.
    """
    streams = (stdin, stdout, stderr)
    launch = _Launch(tuple(os.fspath(word) for word in argv), streams, env, cwd, tuple(pass_fds), enter)
    return launch.start() if enter is None else threads.call_in_new_thread(launch.start).watched()


@dataclass(frozen=True, slots=True)
class _Launch:
    """Everything that one Popen call needs."""

    argv: tuple[str, ...]
    streams: tuple[int | None, int | None, int | None]
    env: Mapping[str, str] | None
    cwd: Path | None
    pass_fds: tuple[int, ...]
    enter: Callable[[], None] | None

    def start(self) -> Child:
        if self.enter is not None:
            self.enter()
        # Held, since in another thread than the loop's the Reaper could see the child before it is claimed.
        with _claims.hold():
            pid = self._execute()
            _claims.add(pid)
        try:
            return Child(pid, pidfd.open_pidfd(pid))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            _claims.discard(pid)
            raise

    def _execute(self) -> int:
        env = inherited_environment() if self.env is None else self.env
        try:
            # In a session of its own: a Ctrl-C on the daemon's terminal is for the daemon.
            return posix_spawn(self.argv, env, cwd=self.cwd, streams=self.streams, pass_fds=self.pass_fds)
        except OSError as error:
            explained = self._explained(error)
            if explained is None:
                raise
            raise explained from error

    def _explained(self, error: OSError) -> CriShimError | None:
        program = self.argv[0]
        if error.errno in {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}:
            hint = "look at the limits of processes, memory and open files on this node"
            return ResourceExhausted(f"cannot start {program}: {error.strerror}", hint=hint)
        if self.cwd is not None and error.filename is not None and Path(error.filename) == self.cwd:
            return None
        if error.errno == errno.ENOENT:
            hint = "install it, or name its path in the configuration"
            return FailedPrecondition(f"program {program} is missing on this node", hint=hint)
        if error.errno in {errno.EACCES, errno.ENOEXEC, errno.EPERM}:
            return FailedPrecondition(f"cannot execute {program}: {error.strerror}")
        return None


async def run(  # noqa: PLR0913  as `spawn`
    argv: Sequence[str | Path],
    *,
    stdin: bytes = b"",
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    enter: Callable[[], None] | None = None,
    limit: int = 1 << 20,
    inflight: bool = True,
) -> Completed:
    """Run a short-lived process to its end, with at most `limit` bytes kept of each output stream.

    After `timeout` seconds its process group is killed and DeadlineExceeded names the program; a cancelled caller
    kills it too, and it has been reaped when this returns. Other errors as in `spawn`; the return code is the caller's
    to judge. `inflight`: the child inherits the lock of `set_inflight_fd`.
    """
    words = tuple(os.fspath(word) for word in argv)
    inherited = (*pass_fds, _inflight) if inflight and _inflight >= 0 else tuple(pass_fds)
    with contextlib.ExitStack() as open_pipes:
        feed = Feed(stdin) if stdin else None
        drains = (Drain(limit), Drain(limit))
        for pipe in (feed, *drains) if feed else drains:
            open_pipes.callback(pipe.close)
        streams = (feed.child_end if feed else None, drains[0].child_end, drains[1].child_end)
        child = await _start(_Launch(words, streams, env, cwd, inherited, enter))
        for pipe in (feed, *drains) if feed else drains:
            pipe.begin()
        try:
            async with asyncio.timeout(timeout):
                returncode = await child.wait()
                await asyncio.wait([drain.ended for drain in drains], timeout=_LINGER)
        except TimeoutError:
            msg = f"{words[0]} did not finish within {timeout:g} s and was killed"
            raise DeadlineExceeded(msg) from None
        finally:
            await _end(child)
        return Completed(words, returncode, bytes(drains[0].data), bytes(drains[1].data))


async def _start(launch: _Launch) -> Child:
    # In a thread in any case: until the child has executed its program, its parent is stopped (vfork(2)).
    starting = asyncio.ensure_future(threads.await_in_new_thread(launch.start))
    try:
        return (await asyncio.shield(starting)).watched()
    except asyncio.CancelledError:
        starting.add_done_callback(_kill_late)
        if launch.enter is None:  # what enters may hang; this is there in a moment, or has failed
            await asyncio.wait([starting])
            if starting.exception() is None:
                await _end(starting.result())
        raise


def _kill_late(starting: asyncio.Future[Child]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().watched().kill()


async def _end(child: Child) -> None:
    """Kill the whole group of a child that still runs, and reap the child."""
    if child.pidfd < 0:
        return
    # Safe: the child has not been reaped, so its pid, and with it the group's number, is still its own.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REAP_WAIT):
            await child.wait()


def adopt(pid: int) -> Child:
    """Watch a process that became our child (conmon, by the subreaper), or that is not our child at all.

    The caller has checked that `pid` still is the process it means (`process_start_time`). ProcessLookupError when
    there is none.
    """
    _claims.add(pid)
    try:
        return Child(pid, pidfd.open_pidfd(pid))
    except OSError:
        _claims.discard(pid)
        raise


class Reaper:
    """Reaps children that nobody asked for: what an exec or a hook left behind and the subreaper inherited.

    waitid(2) shows the first ended child until somebody reaps it. When that one is claimed, its `Child` reaps it in
    this same loop and the change of claims leads to the next look, so no child is overlooked and none is polled for.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to listen to SIGCHLD; in the main thread, once per process."""
        self._loop = loop
        loop.add_signal_handler(signal.SIGCHLD, self._look)
        _claims.on_change = self._schedule
        self._look()

    def stop(self) -> None:
        """Stop listening."""
        if self._loop is not None:
            self._loop.remove_signal_handler(signal.SIGCHLD)
            _claims.on_change = None
            self._loop = None

    def claim(self, pid: int) -> None:
        """Somebody else waits for this child. `Child` does this by itself."""
        _claims.add(pid)

    def unclaim(self, pid: int) -> None:
        """Nobody waits for it any more."""
        _claims.discard(pid)

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """While any of these is open nothing is reaped: a conmon or exec is starting whose pid is not known yet."""
        return _claims.hold()

    def _schedule(self) -> None:
        # From any thread; coalesced, as a burst of exits changes the claims many times.
        if self._loop is not None and not self._pending:
            self._pending = True
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._pending = False
        with contextlib.suppress(ChildProcessError):
            while status := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if not _claims.reapable(status.si_pid):
                    return
                os.waitid(os.P_PID, status.si_pid, os.WEXITED | os.WNOHANG)


def set_child_subreaper(*, enabled: bool = True) -> None:
    """Become the parent of every orphan among our descendants: daemonised conmons, detached execs."""
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, int(enabled))


def reset_oom_score_adj(pid: int) -> None:
    """Give a child the neutral score, when the daemon's own is lower (raising needs no capability)."""
    if int(Path("/proc/self/oom_score_adj").read_bytes()) < 0:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            Path(f"/proc/{pid}/oom_score_adj").write_bytes(b"0")


def set_oom_score_adj(pid: int, score: int) -> None:
    """Give a child a score (proc_pid_oom_score_adj(5)), unless the kernel allows us none so low. Gone = success."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        Path(f"/proc/{pid}/oom_score_adj").write_bytes(b"%d" % score)


def process_start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot (proc(5), stat field 22); None when there is none.

    The pair of pid and start time names one process for ever.
    """
    fields = _stat(pid)
    return int(fields[22 - 3]) if fields else None


def is_alive(pid: int, started: int) -> bool:
    """Whether the process that had `pid` since `started` (`process_start_time`) has not ended; a zombie has."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in {b"Z", b"X"} and int(fields[22 - 3]) == started


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on, none when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return stat[stat.rindex(b")") + 2 :].split()  # the name may hold spaces and brackets


def find_processes(predicate: Callable[[list[str]], bool]) -> list[int]:
    """The pids whose command line satisfies `predicate`. Reads all of /proc: call it in a thread."""
    found = []
    for entry in os.listdir("/proc"):  # noqa: PTH208  thousands of names: no Path objects
        if not entry.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{entry}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            if predicate([os.fsdecode(word) for word in words]):
                found.append(int(entry))
    return found
