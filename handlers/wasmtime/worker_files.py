"""What a worker has in its container's bundle: where it is, and what it says.

Not who makes it (`handlers.wasmtime.workers`). Invariant: by these alone a later daemon finds a worker, or how it has
ended.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cri_shim.kernel import pidfd, process
from cri_shim.model.container import Exit


@dataclass(frozen=True, slots=True)
class Files:
    """What a worker has in its container's bundle."""

    bundle: Path

    @property
    def socket(self) -> Path:
        return self.bundle / "worker.sock"

    @property
    def exit(self) -> Path:
        return self.bundle / "worker.exit"

    @property
    def note(self) -> Path:
        """`PID STARTTIME KILLS`: the first two name one process for ever; OOM kills that were there before it."""
        return self.bundle / "worker.pid"

    @property
    def empty(self) -> Path:
        return self.bundle / "empty"

    def remove(self) -> None:
        """Gone is success."""
        for file in (self.socket, self.exit, self.note):
            file.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.empty.rmdir()


@dataclass(frozen=True, slots=True)
class Note:
    """What is in `Files.note`."""

    pid: int
    started: int
    oom_kills: int = 0


def noted(files: Files) -> Note | None:
    """None when there is no note, or none that can be read."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        return Note(*map(int, files.note.read_text(encoding="ascii").split()))
    return None


def running(files: Files) -> process.Child | None:
    """The worker that the note names, if it still runs."""
    note = noted(files)
    if note is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        fd = pidfd.open_pidfd(note.pid)
        if process.process_start_time(note.pid) == note.started:
            return process.Child(note.pid, fd)
        os.close(fd)
    return None


def said(files: Files) -> Exit | None:
    """The end as the worker has written it down, if it came to that."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(files.exit.read_bytes(), type=Exit)
    return None


def short_name(path: Path, stack: contextlib.ExitStack) -> str:
    """A name for a socket that fits into its address, which has 108 bytes (unix(7))."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, directory)
    return f"/proc/self/fd/{directory}/{path.name}"
