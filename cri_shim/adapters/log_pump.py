"""From the pipes of in-process containers to their CRI log files and attached clients: one thread for all of them.

Not for containers under a monitor process, which does that itself. Invariant: a pipe is drained as long as the clients
of its container read, and one container never holds up another. A log that cannot be written (disk full, gone) loses
text and never stops its container; one that hangs (a dead network file system) holds up its own, until that is to end.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cri_shim.adapters.hang_watch import HangWatch
from cri_shim.adapters.log_sink import LogFile
from cri_shim.model.streams import PIECE_BYTES
from cri_shim.wire import conmon
from cri_shim.wire.crilog import LineSplitter, Stream

_BATCH: Final = 64 * 1024
"""Bytes of one read: what a pipe holds."""
_HELD: Final = 1 << 20
"""Bytes that may wait for a log that hangs, of a container that is to end."""
_PATIENCE: Final = 0.1
"""Seconds after which a call to a log hangs."""
_LAST_WORDS: Final = 1.0
"""Seconds that a container which is to end has for what it wrote before, if its log hangs."""
_LOOKS: Final = (0.02, 0.1, 1.0)
"""Seconds between two looks for such calls: while there are some; while something is written; else."""


def _read(fd: int) -> bytes | None:
    """Empty at the end, which a terminal says by EIO: nobody has it open any more. None when there is nothing yet."""
    try:
        return os.read(fd, _BATCH)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""


@dataclass(slots=True, eq=False)
class Pumped:
    """One container's outputs that have not ended, and the clients that get a copy. For the pump only."""

    log: LogFile
    drained: Callable[[], None]
    open: set[int]
    taps: list[_Tap] = field(default_factory=list)
    is_read: bool = True
    """Its pipes are waited for."""
    stopping: bool = False
    """It is to end, and nothing holds it up any more."""
    hangs: bool = False
    """Its log does not return from a call; a thread of its own waits for that, and writes what is `held` then."""
    held: list[bytes] = field(default_factory=list)
    give_up_at: float = float("inf")
    given_up: bool = False
    ended: bool = False
    told: bool = False

    @property
    def is_held_up(self) -> bool:
        return not self.stopping and (self.hangs or any(tap.waiting for tap in self.taps))


@dataclass(slots=True, eq=False)
class _Attempt:
    """A call to a log that may hang. `lost`: another thread does the rest of the work by now."""

    container: Pumped
    since: float
    lost: bool = False


@dataclass(slots=True, eq=False)
class _Tap:
    """A client's socket, and the packets that it has no room for."""

    end: socket.socket
    container: Pumped
    waiting: deque[bytes] = field(default_factory=deque)

    def send(self) -> bool:
        """Send what waits, as far as there is room. False when the client has left."""
        try:
            while self.waiting:
                self.end.send(self.waiting[0])
                self.waiting.popleft()
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


@dataclass(slots=True)
class _Output:
    """The read end of one pipe."""

    container: Pumped
    stream: Stream
    splitter: LineSplitter = field(init=False)

    def __post_init__(self) -> None:
        self.splitter = LineSplitter(self.stream)


class LogPump:
    """All methods may be called from any thread, but `turn`.

    With `threaded` false there is no thread: somebody else waits for what `start` returns, and calls `turn`.

    One thread leads: it reads all pipes and writes to the logs. When a log does not return from a call, the thread
    stays with that container, and a new one leads. All state is the leader's, but what `_lock` is for.
    """

    def __init__(self, *, threaded: bool = True, begins: Callable[[], None] = lambda: None) -> None:
        """`begins` is called by each thread that leads."""
        self._threaded = threaded
        self._begins = begins
        self._outputs: dict[int, _Output] = {}
        self._starting = threading.Lock()
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._closing = False
        self._asked: deque[Callable[[select.epoll], None]] = deque()
        self._taps: dict[int, _Tap] = {}
        self._thread: threading.Thread | None = None
        self._last = 0
        self._lock = threading.Lock()
        self._attempt: _Attempt | None = None
        self._hanging: set[Pumped] = set()
        self._watch: HangWatch | None = None
        self._turns = self._looked_at = 0

    def start(self) -> select.epoll:
        """Start the thread unless it runs; returns what is waited for. `attach` does it too.

        The thread takes its weight from the one that calls: from the event loop's, not from a container's.
        """
        with self._starting:
            if self._epoll is None:
                self._closing = False
                self._epoll = select.epoll()
                self._wake = os.eventfd(0, os.EFD_CLOEXEC)
                self._epoll.register(self._wake, select.EPOLLIN)
                if self._threaded:
                    self._watch = HangWatch(self._look)
                    self._lead(self._epoll)
            return self._epoll

    def attach(self, log: LogFile, outputs: Mapping[Stream, int], drained: Callable[[], None]) -> Pumped:
        """Take over the read ends of pipes, until each is at its end.

        Then the log is closed and `drained` is called, in the pump's thread: it must not block.
        """
        epoll = self.start()
        container = Pumped(log, drained, set(outputs.values()))
        for stream, fd in outputs.items():
            self._outputs[fd] = _Output(container, stream)
            epoll.register(fd, select.EPOLLIN)
        if self._watch is not None:
            self._watch.wake()
        return container

    def tap(self, container: Pumped, end: socket.socket) -> None:
        """Copy what the container writes from now on to `end`, in the form of conmon's attach socket.

        It is closed when the container has ended. One that nobody reads stops the container's output.
        """
        end.setblocking(False)
        self._ask(lambda _: self._connect(_Tap(end, container)))

    def replace(self, container: Pumped, fd: int, done: Callable[[], None]) -> None:
        """Have its entries written to a file that somebody has opened, which is the pump's then; `done` follows."""

        def replace() -> None:
            container.log.replace(fd)
            done()

        self.call(replace)

    def let_go(self, container: Pumped) -> None:
        """It is to end, and must not wait for its log or for a client: its output is read on.

        A log that hangs loses what it has not taken a second later; a client has the rest as long as it stays.
        """
        self._ask(lambda epoll: self._free(epoll, container))

    def close(self) -> None:
        """End the thread. Containers that still write will block: end them before."""
        if self._epoll is None:
            return
        with self._lock:
            self._closing = True
        if self._watch is not None:
            os.eventfd_write(self._wake, 1)
            while (thread := self._thread) is not None and thread.is_alive():
                thread.join(_PATIENCE)  # it may be left to a log, and another one lead
            self._watch.close()
        self._epoll.close()
        os.close(self._wake)
        self._thread = self._epoll = self._watch = None

    def call(self, request: Callable[[], None]) -> None:
        """Have it called by who writes to the logs, between two turns."""
        self._ask(lambda _: request())

    def _ask(self, request: Callable[[select.epoll], None]) -> None:
        """Have it done by the thread that leads."""
        with self._lock:
            if not self._closing:
                self._asked.append(request)
                os.eventfd_write(self._wake, 1)

    def _lead(self, epoll: select.epoll) -> None:
        self._thread = threading.Thread(target=self._run, args=(epoll,), name="log-pump", daemon=True)
        self._thread.start()

    def _run(self, epoll: select.epoll) -> None:
        self._begins()
        while not self._closing and self._leads:
            self._turns += 1
            self.turn(epoll)

    @property
    def _leads(self) -> bool:
        return self._thread is threading.current_thread()

    def turn(self, epoll: select.epoll, timeout: float | None = None) -> bool:
        """Do what there is to do; wait so many seconds for it if there is nothing. Whether there was something."""
        events = epoll.poll(timeout)
        for fd, event in events:
            if fd == self._wake:
                os.eventfd_read(fd)
                while self._asked:
                    self._asked.popleft()(epoll)
            elif fd in self._taps:
                self._flush(epoll, self._taps[fd])
            elif not self._outputs[fd].container.is_held_up:  # since this poll, by its other stream
                goes_on = self._read(epoll, fd)
                while goes_on and event & select.EPOLLHUP:  # who has ended need not wait for another turn
                    goes_on = self._read(epoll, fd)
            if self._threaded and not self._leads:
                break
        return bool(events)

    def finish(self) -> None:
        """Write what is held back of lines that nobody will end any more. For who calls `turn`."""
        at = max(self._last, time.time_ns())
        for output in self._outputs.values():
            entries = output.splitter.finish(at)
            if entries:
                output.container.log.write(entries)

    def _connect(self, tap: _Tap) -> None:
        if tap.container.open:
            tap.container.taps.append(tap)
        else:
            tap.end.close()

    def _free(self, epoll: select.epoll, container: Pumped) -> None:
        container.stopping = True
        container.give_up_at = time.monotonic() + _LAST_WORDS
        self._arrange(epoll, container)

    def _arrange(self, epoll: select.epoll, container: Pumped) -> None:
        """Wait for its pipes, unless something holds it up."""
        if container.is_read is not container.is_held_up:
            return
        container.is_read = not container.is_held_up
        for fd in container.open:
            if container.is_read:
                epoll.register(fd, select.EPOLLIN)
            else:
                epoll.unregister(fd)

    def _read(self, epoll: select.epoll, fd: int) -> bool:
        """Whether there can be more at once."""
        output = self._outputs[fd]
        container, data = output.container, _read(fd)
        if data is None:
            return False
        # A clock that is set back must not make entries sort before those that are in the file.
        self._last = at = max(self._last, time.time_ns())
        entries = output.splitter.feed(data, at) if data else output.splitter.finish(at)
        if data:
            self._copy(epoll, output, data)
        else:
            epoll.unregister(fd)
            del self._outputs[fd]
            os.close(fd)
            container.open.remove(fd)
        if entries and not self._write(epoll, container, entries):
            return False
        if not container.open:
            self._end(epoll, container)
        return bool(data) and container.is_read

    def _copy(self, epoll: select.epoll, output: _Output, data: bytes) -> None:
        container = output.container
        kind = conmon.ATTACH_ERROR if output.stream is Stream.STDERR else conmon.ATTACH_OUTPUT
        for tap in tuple(container.taps):
            tap.waiting.extend(
                bytes((kind,)) + data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)
            )
            if tap.end.fileno() in self._taps:  # the container is stopping
                if len(tap.waiting) > _HELD // PIECE_BYTES:
                    self._forget(epoll, tap)
                    self._drop(tap)
            elif not tap.send():
                self._drop(tap)
            elif tap.waiting:
                self._taps[tap.end.fileno()] = tap
                epoll.register(tap.end, select.EPOLLOUT)
        self._arrange(epoll, container)

    def _flush(self, epoll: select.epoll, tap: _Tap) -> None:
        here = tap.send()
        if here and tap.waiting:
            return
        self._forget(epoll, tap)
        if not here or tap.container.ended:
            self._drop(tap)
        self._arrange(epoll, tap.container)

    def _forget(self, epoll: select.epoll, tap: _Tap) -> None:
        del self._taps[tap.end.fileno()]
        epoll.unregister(tap.end)

    def _drop(self, tap: _Tap) -> None:
        tap.container.taps.remove(tap)
        tap.end.close()

    def _write(self, epoll: select.epoll, container: Pumped, entries: bytes) -> bool:
        """False when another thread leads by now."""
        with self._lock:
            if container.hangs:
                _hold(container, entries)
                return True
            same = self._threaded and any(each.log.device == container.log.device for each in self._hanging)
            if same:  # it would hang likewise
                container.hangs = True
                self._hanging.add(container)
                container.held.append(entries)
        if not same:
            return self._call(container, lambda: container.log.write(entries))
        self._arrange(epoll, container)
        threading.Thread(target=self._stay, args=(container,), name="log-hangs", daemon=True).start()
        return True

    def _call(self, container: Pumped, call: Callable[[], None]) -> bool:
        """A call to its log. False when another thread leads by now: what is still to be done, that one does."""
        if not self._threaded:
            call()
            return True
        attempt = self._attempt = _Attempt(container, time.monotonic())
        call()
        with self._lock:
            if not attempt.lost:
                self._attempt = None
                return True
        self._stay(container)
        return False

    def _stay(self, container: Pumped) -> None:
        """The thread of one container alone: write what is held, and give it back when its log has taken that."""
        while True:
            with self._lock:
                entries = b"".join(container.held)
                container.held.clear()
                if not entries:
                    self._hanging.discard(container)
                    container.hangs = False
                    break
            container.log.write(entries)
        if container.given_up:
            container.log.close()
        self._ask(lambda epoll: self._take_back(epoll, container))

    def _take_back(self, epoll: select.epoll, container: Pumped) -> None:
        self._arrange(epoll, container)
        if not container.open:
            self._end(epoll, container)

    def _end(self, epoll: select.epoll, container: Pumped) -> None:
        """All that it wrote has been read."""
        if not container.ended:
            container.ended = True
            for tap in tuple(container.taps):
                if not tap.waiting:
                    self._drop(tap)
        if container.hangs or container.told:
            return
        if self._call(container, container.log.close):
            container.told = True
            container.drained()

    def _look(self) -> float | None:
        """See to what does not get on; in how many seconds again. In a thread of its own."""
        now, epoll = time.monotonic(), self._epoll
        with self._lock:
            attempt = self._attempt
            if attempt is not None and epoll is not None and now - attempt.since >= _PATIENCE:
                self._replace(attempt, epoll)
            late = [each for each in self._hanging if each.give_up_at <= now and not each.given_up]
        if late:
            self._ask(lambda _: self._give_up(late))
        at_times, self._looked_at = self._turns != self._looked_at, self._turns
        if self._hanging:
            return _LOOKS[0]
        if not self._outputs:
            return None
        return _LOOKS[1] if at_times else _LOOKS[2]

    def _replace(self, attempt: _Attempt, epoll: select.epoll) -> None:
        """Have another thread lead. With the lock."""
        before = self._thread
        try:
            self._lead(epoll)
        except RuntimeError:  # there can be no more threads now
            self._thread = before
            return
        attempt.lost, attempt.container.hangs, self._attempt = True, True, None
        self._hanging.add(attempt.container)
        self._asked.append(lambda epoll: self._arrange(epoll, attempt.container))
        os.eventfd_write(self._wake, 1)

    def _give_up(self, containers: Sequence[Pumped]) -> None:
        """Tell the ends of those without their last words."""
        for container in containers:
            with self._lock:
                if not container.hangs or container.open:
                    continue
                container.given_up = True
                container.log.dropped += sum(map(len, container.held))
                container.held.clear()
            if not container.told:
                container.told = True
                container.drained()


def _hold(container: Pumped, entries: bytes) -> None:
    if sum(map(len, container.held)) + len(entries) <= _HELD:
        container.held.append(entries)
    else:
        container.log.dropped += len(entries)
