"""posix_spawn(3): a child that executes another program, started without the interpreter's lock.

Not for who waits for the child (`cri_shim.kernel.process`). Invariant: a child has the descriptors that it is given and
no others.

`subprocess` holds the lock until the child has executed its program, which takes 10 ms on a busy machine; nothing else
of the daemon can run meanwhile, its loop included.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from errno import EINVAL, ENOENT, ENOSYS
from pathlib import Path
from typing import Final

from cri_shim.kernel import libc

_SETSIGDEF: Final = 0x04
_SETSID: Final = 0x80
"""spawn.h, the same in glibc and musl."""

_STRUCTURE_BYTES: Final = 512
"""More than `posix_spawnattr_t` (336) or `posix_spawn_file_actions_t` (80) take in glibc and in musl."""
_ALL_SIGNALS: Final = b"\xff" * 8 + bytes(120)
"""A `sigset_t`."""

_Structure = ctypes.c_char * _STRUCTURE_BYTES
_libc = ctypes.CDLL(None)


def posix_spawn(
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    cwd: Path | None,
    streams: tuple[int | None, int | None, int | None],
    pass_fds: Sequence[int],
) -> int:
    """Start a program in a session of its own; returns its pid once it has been executed.

    A stream that is None is /dev/null; `pass_fds` keep their numbers. OSError names the program, or `cwd`.
    """
    program = argv[0] if "/" in argv[0] else shutil.which(argv[0], path=env.get("PATH", os.defpath))
    if program is None:
        raise _error(ENOENT, argv[0])
    words, environment = _Vector(argv), _Vector([f"{name}={value}" for name, value in env.items()])
    actions, attributes, pid = _Structure(), _Structure(), ctypes.c_int()
    moved: list[int] = []
    _close_on_exec()
    _must(_libc.posix_spawn_file_actions_init(actions))
    _must(_libc.posix_spawnattr_init(attributes))
    try:
        if cwd is not None:
            _must(_libc.posix_spawn_file_actions_addchdir_np(actions, os.fsencode(cwd)))
        for number, fd in enumerate(streams):
            if fd is None:
                _must(_libc.posix_spawn_file_actions_addopen(actions, number, b"/dev/null", os.O_RDWR, 0))
            else:
                _must(_libc.posix_spawn_file_actions_adddup2(actions, _above_streams(fd, number, moved), number))
        for fd in pass_fds:
            # To itself: what exec would close stays open.
            _must(_libc.posix_spawn_file_actions_adddup2(actions, fd, fd))
        _set(attributes)
        failed = _libc.posix_spawn(
            ctypes.byref(pid), os.fsencode(program), actions, attributes, words.pointer, environment.pointer
        )
    finally:
        _libc.posix_spawn_file_actions_destroy(actions)
        _libc.posix_spawnattr_destroy(attributes)
        for fd in moved:
            os.close(fd)
    if failed:
        raise _error(failed, str(cwd) if cwd is not None and not cwd.is_dir() else argv[0])
    return pid.value


class _Vector:
    """A `char *const []`. By hand: ctypes makes a type for each length of an array, and keeps it until a collection."""

    def __init__(self, words: Sequence[str]) -> None:
        encoded = [os.fsencode(word) for word in words]
        if any(b"\0" in word for word in encoded):
            msg = "embedded null byte"
            raise ValueError(msg)
        self._text = b"".join(word + b"\0" for word in encoded)
        at = ctypes.cast(ctypes.c_char_p(self._text), ctypes.c_void_p).value or 0
        self._addresses = array.array("L")
        for word in encoded:
            self._addresses.append(at)
            at += len(word) + 1
        self._addresses.append(0)

    @property
    def pointer(self) -> ctypes.c_void_p:
        """Good as long as the vector is."""
        return ctypes.c_void_p(self._addresses.buffer_info()[0])


def _set(attributes: ctypes.Array[ctypes.c_char]) -> None:
    """A session of its own, and no signal ignored: neither those of Python nor what glibc has for itself.

    Not only a process group: what weighs the daemon's session against others (`priority`) is not for its children.
    """
    # Not by sigfillset(3), which leaves those of glibc out: posix_spawn would have them ignored (32 and 33).
    _must(_libc.posix_spawnattr_setsigdefault(attributes, _ALL_SIGNALS))
    _must(_libc.posix_spawnattr_setflags(attributes, ctypes.c_short(_SETSID | _SETSIGDEF)))


def _above_streams(fd: int, target: int, moved: list[int]) -> int:
    """The descriptor where setting up the other streams cannot overwrite it."""
    if fd == target or fd > 2:
        return fd
    moved.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
    return moved[-1]


def _close_on_exec() -> None:
    """Mark every descriptor of this process: no library's, and none that the daemon was started with, is handed on."""
    try:
        libc.close_range_on_exec(3)
    except OSError as error:
        if error.errno not in {ENOSYS, EINVAL}:  # before Linux 5.11
            raise
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  no Path objects
            if int(name) > 2:
                _try_not_inheritable(int(name))


def _try_not_inheritable(fd: int) -> None:
    try:
        os.set_inheritable(fd, False)
    except OSError:
        return  # closed meanwhile


def _must(number: int) -> None:
    if number:
        raise OSError(number, os.strerror(number))


def _error(number: int, name: str) -> OSError:
    return OSError(number, os.strerror(number), name)
