"""A container's log file, as who writes it sees it.

Not for readers (`cri_shim.adapters.log_file`). Invariant: what is in the file are whole entries, whatever fails.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Final

from cri_shim.model.errors import FailedPrecondition

_MODE: Final = 0o640


class LogFile:
    """The log of one container. A path of None discards. Every method may be called from any thread and may block."""

    def __init__(self, path: str | Path | None) -> None:
        """OSError, with the path, when the file cannot be opened or made."""
        self._path = path
        self._lock = threading.Lock()
        self._fd = open_log(path) if path is not None else -1
        self.device = os.fstat(self._fd).st_dev if self._fd >= 0 else -1
        """The file system's, as stat(2) has it."""
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
