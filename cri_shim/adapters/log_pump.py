"""From the pipes of in-process containers to their CRI log files and attached clients: one thread for all of them.

Not for containers under a monitor process, which does that itself. Invariant: a pipe is drained as long as the clients
of its container read, and one container never holds up another. A log that cannot be written (disk full, gone) loses
text and never stops its container; what is in the file stays whole entries.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.streams import PIECE_BYTES
from cri_shim.wire import conmon
from cri_shim.wire.crilog import LineSplitter, Stream

_BATCH: Final = 64 * 1024
"""Bytes of one read: what a pipe holds."""
_MODE: Final = 0o640


class LogFile:
    """The log of one container. A path of None discards. Every method may be called from any thread and may block."""

    def __init__(self, path: str | Path | None) -> None:
        """OSError, with the path, when the file cannot be opened or made."""
        self._path = path
        self._lock = threading.Lock()
        self._fd = open_log(path) if path is not None else -1
        self.dropped = 0
        """Bytes of entries that could not be written."""

    def write(self, entries: bytes) -> None:
        """Append whole entries, or drop those that do not fit."""
        with self._lock:
            if self._fd < 0:
                return
            written = 0
            try:
                while written < len(entries):
                    written += os.write(self._fd, memoryview(entries)[written:])
            except OSError:
                kept = entries.rfind(b"\n", 0, written) + 1
                self.dropped += len(entries) - kept
                self._cut(written - kept)

    def _cut(self, torn: int) -> None:
        """Take back the part of an entry that did fit."""
        if torn:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - torn)

    def reopen(self) -> None:
        """Entries written from now on go to the file that is at the path then; on OSError to the old one, as before.

        FailedPrecondition when it is closed: nothing would make the file, and who renamed the old one has to know.
        """
        if self._path is None:
            return
        with self._lock:
            if self._fd < 0:
                msg = f"the log {self._path} is closed: the container has ended"
                raise FailedPrecondition(msg)
            fd, self._fd = self._fd, open_log(self._path)
            os.close(fd)

    def replace(self, fd: int) -> None:
        """Likewise, to a file that somebody else has opened."""
        with self._lock:
            old, self._fd = self._fd, fd
        if old >= 0:
            os.close(old)

    def close(self) -> None:
        """Write no more. Closed already is success."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def open_log(path: str | Path) -> int:
    """A descriptor that appends to the log, which is made when it is missing. OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
    os.fchmod(fd, _MODE)  # whatever the umask
    return fd


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

    @property
    def is_held_up(self) -> bool:
        return any(tap.waiting for tap in self.taps)


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
    """

    def __init__(self, *, threaded: bool = True) -> None:
        self._threaded = threaded
        self._outputs: dict[int, _Output] = {}
        self._starting = threading.Lock()
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._closing = False
        self._asked: deque[_Tap] = deque()
        self._taps: dict[int, _Tap] = {}
        self._thread: threading.Thread | None = None
        self._last = 0

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
                    self._thread = threading.Thread(target=self._run, args=(self._epoll,), name="log-pump", daemon=True)
                    self._thread.start()
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
        return container

    def tap(self, container: Pumped, end: socket.socket) -> None:
        """Copy what the container writes from now on to `end`, in the form of conmon's attach socket.

        It is closed when the container has ended. One that nobody reads stops the container's output.
        """
        end.setblocking(False)
        self._asked.append(_Tap(end, container))
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the thread. Containers that still write will block: end them before."""
        if self._epoll is None:
            return
        if self._thread is not None:
            self._closing = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._epoll.close()
        os.close(self._wake)
        self._thread = self._epoll = None

    def _run(self, epoll: select.epoll) -> None:
        while not self._closing:
            self.turn(epoll)

    def turn(self, epoll: select.epoll) -> None:
        """Do what there is to do; wait for it if there is nothing."""
        for fd, event in epoll.poll():
            if fd == self._wake:
                os.eventfd_read(fd)
                self._connect()
            elif fd in self._taps:
                self._flush(epoll, self._taps[fd])
            elif not self._outputs[fd].container.is_held_up:  # since this poll, by its other stream
                goes_on = self._read(epoll, fd)
                while goes_on and event & select.EPOLLHUP:  # who has ended need not wait for another turn
                    goes_on = self._read(epoll, fd)

    def finish(self) -> None:
        """Write what is held back of lines that nobody will end any more. For who calls `turn`."""
        at = max(self._last, time.time_ns())
        for output in self._outputs.values():
            entries = output.splitter.finish(at)
            if entries:
                output.container.log.write(entries)

    def _connect(self) -> None:
        while self._asked:
            tap = self._asked.popleft()
            if tap.container.open:
                tap.container.taps.append(tap)
            else:
                tap.end.close()

    def _read(self, epoll: select.epoll, fd: int) -> bool:
        """Whether there can be more at once."""
        output = self._outputs[fd]
        data = _read(fd)
        if data is None:
            return False
        # A clock that is set back must not make entries sort before those that are in the file.
        self._last = at = max(self._last, time.time_ns())
        entries = output.splitter.feed(data, at) if data else output.splitter.finish(at)
        if entries:
            output.container.log.write(entries)
        if data:
            self._copy(epoll, output, data)
        else:
            epoll.unregister(fd)
            del self._outputs[fd]
            os.close(fd)
            self._ended(output.container, fd)
        return bool(data) and not output.container.is_held_up

    def _copy(self, epoll: select.epoll, output: _Output, data: bytes) -> None:
        container = output.container
        kind = conmon.ATTACH_ERROR if output.stream is Stream.STDERR else conmon.ATTACH_OUTPUT
        for tap in tuple(container.taps):
            tap.waiting.extend(
                bytes((kind,)) + data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)
            )
            if not tap.send():
                self._drop(tap)
            elif tap.waiting:
                self._taps[tap.end.fileno()] = tap
                epoll.register(tap.end, select.EPOLLOUT)
        if container.is_held_up:
            for fd in container.open:
                epoll.unregister(fd)

    def _flush(self, epoll: select.epoll, tap: _Tap) -> None:
        here = tap.send()
        if here and tap.waiting:
            return
        del self._taps[tap.end.fileno()]
        epoll.unregister(tap.end)
        if not here:
            self._drop(tap)
        if not tap.container.is_held_up:
            for fd in tap.container.open:
                epoll.register(fd, select.EPOLLIN)

    def _drop(self, tap: _Tap) -> None:
        tap.container.taps.remove(tap)
        tap.end.close()

    def _ended(self, container: Pumped, fd: int) -> None:
        container.open.remove(fd)
        if not container.open:
            for tap in container.taps:
                tap.end.close()
            container.log.close()
            container.drained()
