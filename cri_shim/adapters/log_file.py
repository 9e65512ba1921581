"""A container's log file as a reader follows it: from some line on, through rotations, to its end.

Not its lines (`cri_shim.wire.crilog_reader`). All methods block: call them in a thread. Invariant: what was written to
a file before it was rotated away is read before anything of the file that took its place, and no file is left out.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections import defaultdict, deque
from pathlib import Path
from typing import Final

from cri_shim.model.errors import FailedPrecondition, ResourceExhausted
from cri_shim.model.ids import ContainerId

MAX_BEHIND: Final = 64
"""Files that are kept open for a reader that is slower than the rotations, whatever becomes of their names."""
_BLOCK: Final = 1 << 16


class LogFile:
    """Close it when done. The file at `path` may come, go and be replaced at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._lock = threading.Lock()
        self._next: deque[int] = deque()
        self._is_closed = self._is_behind = False

    def open(self, tail: int | None = None) -> bool:
        """Begin with the last `tail` lines, None: all. False when there is no file (yet)."""
        try:
            self._fd = _open(self._path)
        except FileNotFoundError:
            return False
        if tail is not None:
            os.lseek(self._fd, _start_of_last(self._fd, tail), os.SEEK_SET)
        return True

    def read(self) -> bytes:
        """What comes next; nothing at the end, for now."""
        if self._fd < 0 and not self.turn_over():
            return b""
        if os.lseek(self._fd, 0, os.SEEK_CUR) > os.fstat(self._fd).st_size:
            os.lseek(self._fd, 0, os.SEEK_SET)  # somebody has emptied it
        return os.read(self._fd, _BLOCK)

    def rotated(self) -> None:
        """The writer has gone over to the file that is at the path now. For another thread than the reader's."""
        fd = _open_if_there(self._path)
        if fd < 0:
            return
        with self._lock:
            if self._is_closed or len(self._next) == MAX_BEHIND:
                self._is_behind = True
                os.close(fd)
            else:
                self._next.append(fd)

    def turn_over(self) -> bool:
        """At the end of a file that was rotated away: go on with the next one. False when there is none.

        The writer has left the old one by the time that there is a new one, so a last look at the old one is due.
        ResourceExhausted when a file had to be left out.
        """
        # First: were the path looked at after the files that are kept, it could be further than the first of them.
        at_path = self._other_at_path()
        with contextlib.ExitStack() as unused, self._lock:
            if at_path >= 0:
                unused.callback(os.close, at_path)
            while self._next and _are_same(self._next[0], self._fd):
                os.close(self._next.popleft())
            if self._is_unfinished() or (at_path < 0 and not self._next):
                return False
            if self._next:
                self._fd = _closed(self._fd, self._next.popleft())
            elif self._is_behind:
                msg = f"the reader is more than {MAX_BEHIND} rotations behind the log: the rest is not shown"
                raise ResourceExhausted(msg)
            else:
                unused.pop_all()
                self._fd = _closed(self._fd, at_path)
            return True

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            self._is_closed = True
            while self._next:
                os.close(self._next.popleft())
        self._fd = _closed(self._fd)

    def _other_at_path(self) -> int:
        """Opened; -1 when it is the one that is read, or there is none."""
        fd = _open_if_there(self._path)
        return _closed(fd) if fd >= 0 and _are_same(fd, self._fd) else fd

    def _is_unfinished(self) -> bool:
        return self._fd >= 0 and os.lseek(self._fd, 0, os.SEEK_CUR) < os.fstat(self._fd).st_size


class FollowedLogs:
    """The logs that somebody follows, by container. In the event loop only."""

    def __init__(self) -> None:
        self._logs: defaultdict[ContainerId, list[LogFile]] = defaultdict(list)

    def add(self, container_id: ContainerId, log: LogFile) -> None:
        """Before it is opened, so that no rotation comes between."""
        self._logs[container_id].append(log)

    def remove(self, container_id: ContainerId, log: LogFile) -> None:
        """Nobody follows it any more."""
        self._logs[container_id].remove(log)
        if not self._logs[container_id]:
            del self._logs[container_id]

    def of(self, container_id: ContainerId) -> tuple[LogFile, ...]:
        """Those of one container."""
        return tuple(self._logs.get(container_id, ()))


def _closed(fd: int, replacement: int = -1) -> int:
    if fd >= 0:
        os.close(fd)
    return replacement


def _are_same(one: int, other: int) -> bool:
    return other >= 0 and os.path.sameopenfile(one, other)


def _open_if_there(path: Path) -> int:
    try:
        return _open(path)
    except FileNotFoundError:
        return -1


def _open(path: Path) -> int:
    """O_NONBLOCK: what somebody has put in its place may be a pipe."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        msg = f"the log {path} is no regular file"
        raise FailedPrecondition(msg)
    return fd


def _start_of_last(fd: int, lines: int) -> int:
    """The offset of the last `lines` lines; 0 when there are fewer."""
    position = os.fstat(fd).st_size
    wanted = lines + 1  # the newline in front of them
    while position > 0:
        start = max(0, position - _BLOCK)
        block = os.pread(fd, position - start, start)
        newlines = block.count(b"\n")
        if newlines >= wanted:
            end = len(block)
            for _ in range(wanted):
                end = block.rindex(b"\n", 0, end)
            return start + end + 1
        wanted -= newlines
        position = start
    return 0
