"""A cgroup for threads of the daemon that must never starve it: below its own, with the CPU shares that they ask for.

Not for processes, and never below a pod's cgroup: there the kubelet kills every process that it finds, and on v1 a
cgroup with one thread lists the whole daemon. On v2 it is a threaded cgroup (cgroup-v2.rst, "Threads"). Invariant:
where none can be had, nothing fails; the threads' scheduling class and nice value are all there is then.

What weighs is the sum of what its threads ask for, within bounds; among themselves they share it by their nice values.
The rest of the node sees the daemon's own cgroup, whose weight is the administrator's (CPUWeight= of the unit).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Final

from cri_shim.adapters.cgroups import CgroupHost, Version, own_cgroups

_NAME: Final = "cri-shim-threads"
_MYSELF: Final = b"0"
_TRIES: Final = 20
_PAUSE: Final = 0.005
_DEFAULT: Final = 1024
"""CPU shares of who does not say; what each thread of the daemon has."""
_LEAST: Final = 256
"""Of all together, however little they ask for."""
_MOST: Final = 512
"""Of all together, for each CPU: with more the daemon's threads wait for theirs (measured with 100 that compute)."""
_HURRY: Final = 20 * 1024
"""Of all together, while one of them is to come to its end: it takes nearly all of it, and soon leaves."""
_LIMIT: Final = 100 * 1024
"""What both versions can express."""
_KEENEST: Final = -20


class ThreadGroup:
    """All methods block, and may be called from any thread."""

    def __init__(self, host: CgroupHost) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._inside = self._outside = self._weight = -1
        self._failed = False
        self._members: dict[int, int] = {}
        self._hurried: set[int] = set()
        self._written = 0
        self._most = _MOST * len(os.sched_getaffinity(0))

    def weigh(self, thread: int, shares: int) -> None:
        """What the calling thread asks for, before it enters, or another one in there. 0 = it does not say."""
        self._open()
        with self._lock:
            if thread in self._members or thread == threading.get_native_id():
                self._members[thread] = shares or _DEFAULT
                self._weigh()

    def enter(self) -> bool:
        """Move the calling thread in, and what it starts from now on; whether it is in."""
        for _ in range(2):
            tasks = self._open()
            if tasks < 0:
                return False
            try:
                os.write(tasks, _MYSELF)
            except OSError:  # another daemon beside this one has removed it
                self._forget(tasks)
                continue
            return True
        return False

    def leave(self) -> None:
        """Move the calling thread back."""
        if self._outside >= 0:
            with contextlib.suppress(OSError):
                os.write(self._outside, _MYSELF)
        thread = threading.get_native_id()
        with self._lock:
            self._members.pop(thread, None)
            self._hurried.discard(thread)
            self._weigh()

    def hurry(self, thread: int) -> None:
        """Let another thread, which is in there and is to end, come to that before the others, however busy all are.

        By weights: a move of another thread than the calling one would wait for all that fork and end
        (cgroup_threadgroup_rwsem), 10 ms.
        """
        with self._lock, contextlib.suppress(OSError):  # it has ended, or nobody is to change it
            if thread in self._members:
                self._hurried.add(thread)
                self._weigh()
                os.setpriority(os.PRIO_PROCESS, thread, _KEENEST)

    def close(self) -> None:
        """Remove it, unless another daemon uses it; also what a daemon that was killed has left."""
        with self._lock, contextlib.suppress(OSError):
            for fd in (self._inside, self._outside, self._weight):
                if fd >= 0:
                    os.close(fd)
            self._inside = self._outside = self._weight = -1
            own, tasks = self._own()
            if (own / _NAME).exists():
                _empty(own / _NAME / tasks, own / tasks)
                _remove(own / _NAME)
                if self._host.version is Version.V2 and not any(each.is_dir() for each in own.iterdir()):
                    (own / "cgroup.subtree_control").write_text("-cpu")  # else it stays one of threads

    def _open(self) -> int:
        with self._lock:
            if self._inside < 0 and not self._failed:
                try:
                    self._make()
                except OSError:
                    self._failed = True
            return self._inside

    def _forget(self, tasks: int) -> None:
        with self._lock:
            if self._inside == tasks:
                for fd in (self._inside, self._weight):
                    os.close(fd)
                self._inside = self._weight = -1

    def _weigh(self) -> None:
        """With the lock."""
        shares = min(max(_LEAST, sum(self._members.values())), self._most)
        shares = min(max(shares, _HURRY if self._hurried else 0), _LIMIT)
        if self._inside >= 0 and shares != self._written:
            with contextlib.suppress(OSError):  # another daemon has removed it: it is made anew when one enters
                is_v2 = self._host.version is Version.V2
                os.pwrite(self._weight, b"%d" % (shares * 100 // 1024 if is_v2 else shares), 0)
                self._written = shares

    def _own(self) -> tuple[Path, str]:
        """The daemon's own cgroup, and the name of the file of its threads."""
        root, version2 = self._host.controllers.get("cpu"), self._host.version is Version.V2
        own = own_cgroups().get("" if version2 else "cpu")
        if root is None or own is None:
            raise FileNotFoundError("cpu")
        return root / own, "cgroup.threads" if version2 else "tasks"

    def _make(self) -> None:
        own, tasks = self._own()
        place = own / _NAME
        place.mkdir(exist_ok=True)
        if self._host.version is Version.V2:
            if (place / "cgroup.type").read_text().strip() != "threaded":
                (place / "cgroup.type").write_text("threaded")
            (own / "cgroup.subtree_control").write_text("+cpu")
        weight = place / ("cpu.weight" if self._host.version is Version.V2 else "cpu.shares")
        if self._outside < 0:
            self._outside = os.open(own / tasks, os.O_WRONLY | os.O_CLOEXEC)
        self._weight = os.open(weight, os.O_WRONLY | os.O_CLOEXEC)
        self._inside = os.open(place / tasks, os.O_WRONLY | os.O_CLOEXEC)
        self._written = 0
        self._weigh()


def _empty(inside: Path, outside: Path) -> None:
    """Move the threads of this process out: the engine keeps those that it has started for guests."""
    ours = {task.name for task in Path("/proc/self/task").iterdir()}
    for thread in ours & set(inside.read_text().split()):
        with contextlib.suppress(OSError):
            outside.write_text(thread)


def _remove(place: Path) -> None:
    """A thread that has ended is there for a moment longer; those of another daemon stay, and so does the directory."""
    for _ in range(_TRIES):
        with contextlib.suppress(OSError):
            place.rmdir()
            return
        time.sleep(_PAUSE)
