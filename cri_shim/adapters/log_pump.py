"""From the pipes of in-process containers to their CRI log files: one thread for all of them.

Not for containers under a monitor process, which writes the log itself. Invariant: a pipe is always drained. A log that
cannot be written (disk full, gone) loses text and never stops its container; what is in the file stays whole entries.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cri_shim.model.errors import FailedPrecondition
from cri_shim.wire.crilog import LineSplitter, Stream

_BATCH: Final = 64 * 1024
"""Bytes of one read: what a pipe holds."""
_MODE: Final = 0o640


class LogFile:
    """The log of one container. A path of None discards. Every method may be called from any thread and may block."""

    def __init__(self, path: Path | None) -> None:
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


def open_log(path: Path) -> int:
    """A descriptor that appends to the log, which is made when it is missing. OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
    os.fchmod(fd, _MODE)  # whatever the umask
    return fd


@dataclass(slots=True)
class _Container:
    """One container's outputs; `open` counts those that have not ended."""

    log: LogFile
    drained: Callable[[], None]
    open: int


@dataclass(slots=True)
class _Output:
    """The read end of one pipe."""

    container: _Container
    stream: Stream
    splitter: LineSplitter = field(init=False)

    def __post_init__(self) -> None:
        self.splitter = LineSplitter(self.stream)


class LogPump:
    """All methods may be called from any thread."""

    def __init__(self) -> None:
        self._outputs: dict[int, _Output] = {}
        self._starting = threading.Lock()
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._last = 0

    def start(self) -> select.epoll:
        """Start the thread unless it runs; returns what it waits on. `attach` does it too.

        The thread takes its weight from the one that calls: from the event loop's, not from a container's.
        """
        with self._starting:
            if self._epoll is None:
                self._epoll = select.epoll()
                self._wake = os.eventfd(0, os.EFD_CLOEXEC)
                self._epoll.register(self._wake, select.EPOLLIN)
                self._thread = threading.Thread(target=self._run, args=(self._epoll,), name="log-pump", daemon=True)
                self._thread.start()
            return self._epoll

    def attach(self, log: LogFile, outputs: Mapping[Stream, int], drained: Callable[[], None]) -> None:
        """Take over the read ends of pipes, until each is at its end.

        Then the log is closed and `drained` is called, in the pump's thread: it must not block.
        """
        epoll = self.start()
        container = _Container(log, drained, len(outputs))
        for stream, fd in outputs.items():
            self._outputs[fd] = _Output(container, stream)
            epoll.register(fd, select.EPOLLIN)

    def close(self) -> None:
        """End the thread. Containers that still write will block: end them before."""
        if self._thread is None or self._epoll is None:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._epoll.close()
        os.close(self._wake)
        self._thread = self._epoll = None

    def _run(self, epoll: select.epoll) -> None:
        while True:
            for fd, _ in epoll.poll():
                if fd == self._wake:
                    return
                self._read(epoll, fd)

    def _read(self, epoll: select.epoll, fd: int) -> None:
        output = self._outputs[fd]
        data = os.read(fd, _BATCH)
        # A clock that is set back must not make entries sort before those that are in the file.
        self._last = at = max(self._last, time.time_ns())
        entries = output.splitter.feed(data, at) if data else output.splitter.finish(at)
        if entries:
            output.container.log.write(entries)
        if not data:
            epoll.unregister(fd)
            del self._outputs[fd]
            os.close(fd)
            self._ended(output.container)

    def _ended(self, container: _Container) -> None:
        container.open -= 1
        if not container.open:
            container.log.close()
            container.drained()
