"""One exec'ed process: its exit status, its end with all its descendants, and its note for the next daemon.

Not its streams, which are the caller's. Invariant: after `kill` has returned, neither the process nor anything that
descends from it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cri_shim.kernel import pidfd, process
from cri_shim.model.errors import Internal

_KILL_SECONDS: Final = 10.0
_NOTE: Final = ".pid"
_DOCUMENT: Final = ".json"
_LOG: Final = ".log"


class OciExecSession:
    """An `ExecSession`. `note` is the file that the runtime wrote the pid into."""

    def __init__(self, child: process.Child, note: Path, terminal: int = -1) -> None:
        self.terminal = terminal
        self._child = child
        self._note = note

    async def wait(self) -> int:
        """The exit status, 128 + n for signal n."""
        returncode = await self._child.wait()
        _forget(self._note)
        return 128 - returncode if returncode < 0 else returncode

    async def kill(self) -> None:
        """SIGKILL to the process and all its descendants; returns when they are gone. Gone already = success."""
        if self._child.pidfd >= 0:
            await asyncio.to_thread(kill_tree, self._child.pid)
            await self._child.wait()
        _forget(self._note)


def remember(note: Path, pid: int) -> None:
    """Complete what the runtime wrote: pid and start time together name one process for ever."""
    # Appended: a file that is cut and written anew makes ext4 wait for the disk.
    with note.open("a", encoding="ascii") as file:
        file.write(f" {process.process_start_time(pid) or 0}")


def abandon(note: Path, members: list[int]) -> None:
    """Kill what an exec that failed, or that an earlier daemon began, has started all the same, and forget it.

    `members` are the pids in the container's cgroup: a note without a start time counts only for one of them.
    """
    with contextlib.suppress(ValueError, FileNotFoundError):
        pid, *started = map(int, note.read_text(encoding="ascii").split())
        same = process.process_start_time(pid) == started[0] if started else pid in members
        if same:
            kill_tree(pid)
    _forget(note)


def abandon_all(directory: Path, members: list[int]) -> None:
    """Likewise for every exec that has left something in the directory."""
    for file in directory.glob(f"*{_DOCUMENT}"):
        abandon(file.with_suffix(_NOTE), members)


def kill_tree(root: int) -> None:
    """SIGKILL to a process and its descendants, until none is left. Blocks. Internal when one does not die."""
    deadline = time.monotonic() + _KILL_SECONDS
    with contextlib.ExitStack() as opened:
        tree: dict[int, int] = {}
        # Stopped first, parents before children: a stopped process forks no more, so that one pass that finds nothing
        # new has seen all.
        while new := [pid for pid in _descendants(root) if pid not in tree]:
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    tree[pid] = pidfd.open_pidfd(pid)
                    opened.callback(os.close, tree[pid])
                    pidfd.send_signal(tree[pid], signal.SIGSTOP)
            if time.monotonic() > deadline:
                break
        for fd in tree.values():
            pidfd.send_signal(fd, signal.SIGKILL)
        if not all(_is_gone(fd, deadline) for fd in tree.values()):
            msg = f"process {root} or a descendant has not ended {_KILL_SECONDS:g} s after SIGKILL"
            raise Internal(msg, hint="it may be stuck in the kernel (state D)")


def _descendants(pid: int) -> Iterator[int]:
    """The process itself, then its children, theirs, and so on (proc_pid_task_tid_children(5))."""
    yield pid
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from _descendants(int(child))


def _is_gone(fd: int, deadline: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _forget(note: Path) -> None:
    for file in (note, note.with_suffix(_DOCUMENT), note.with_suffix(_LOG)):
        file.unlink(missing_ok=True)
