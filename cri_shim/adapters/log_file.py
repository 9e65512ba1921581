"""A container's log file as a reader follows it: from some line on, through rotations, to its end.

Not its lines (`cri_shim.wire.crilog_reader`). All methods block: call them in a thread. Invariant: what was written to
a file before it was rotated away is read before anything of the file that took its place.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from cri_shim.model.errors import FailedPrecondition

_BLOCK: Final = 1 << 16


class LogFile:
    """Close it when done. The file at `path` may come, go and be replaced at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

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
        if self._fd < 0 and not self.open():
            return b""
        if os.lseek(self._fd, 0, os.SEEK_CUR) > os.fstat(self._fd).st_size:
            os.lseek(self._fd, 0, os.SEEK_SET)  # somebody has emptied it
        return os.read(self._fd, _BLOCK)

    def turn_over(self) -> bool:
        """At the end of a file that was rotated away: go on with the one in its place. False when it is the same.

        The writer has left the old one by the time that there is a new one, so a last look at the old one is due.
        """
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return False
        mine = os.fstat(self._fd) if self._fd >= 0 else None
        if mine is None or (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino):
            return False
        if os.lseek(self._fd, 0, os.SEEK_CUR) < mine.st_size:
            return False
        self.close()
        return self.open()

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


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
