"""The files of a container as its module sees them: the preopen with the longest prefix, and what lies beneath it.

    /data/in/x  ─▶ preopen /data, `in/x` beneath it (openat2(2)): no `..` and no symlink leads out, as in the engine

Invariant: what is opened here is opened by the calling process's own rights, from descriptors of the preopens alone.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from cri_shim.kernel import libc
from handlers.wasmtime.guest_spec import Preopen

_TRIES: Final = 32
_LEADS_OUT: Final = "A symbolic link leads out of the preopened directory"


@dataclass(frozen=True, slots=True)
class Status:
    """Of a file; `os.stat_result` in short. A directory that is only on the way to preopens has no inode."""

    mode: int
    size: int = 0
    blocks: int = 0
    block_size: int = 4096
    inode: int = 0
    links: int = 1
    uid: int = 0
    gid: int = 0
    read_ns: int = 0
    modified_ns: int = 0
    changed_ns: int = 0


_ON_THE_WAY: Final = Status(stat.S_IFDIR | 0o555)


class View:
    """Opens the preopens when it is made, so that the host's paths are not needed any more."""

    def __init__(self, preopens: Sequence[Preopen], cwd: str) -> None:
        """OSError when a directory is gone."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._readonly = {preopen.guest for preopen in preopens if preopen.readonly}
        self._roots = {preopen.guest: os.open(preopen.host, flags) for preopen in preopens}
        self._cwd = cwd

    def normal(self, path: str) -> str:
        """Absolute, without `.` and `..`: those count before symlinks, as in a shell."""
        return "/" + posixpath.normpath(posixpath.join("/", self._cwd, path)).lstrip("/")

    def preopen(self, path: str) -> str:
        """The guest's name of the preopen that `path` lies in. FileNotFoundError when it lies in none."""
        wanted = self.normal(path)
        found = [guest for guest in self._roots if _beneath(wanted, guest) is not None]
        if not found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return max(found, key=len)

    def root(self, guest: str) -> int:
        """The descriptor of a preopen, by the guest's name."""
        return self._roots[guest]

    @contextmanager
    def opened(self, path: str, flags: int) -> Iterator[int]:
        """A descriptor for as long as the block lasts. OSError."""
        flags |= 0 if flags & os.O_PATH else os.O_NOCTTY
        guest = self.preopen(path)
        beneath = _beneath(self.normal(path), guest) or "."
        descriptor = _open(self._roots[guest], beneath, flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def created(self, path: str, mode: int) -> Iterator[int]:
        """A descriptor to write a new file by, or the one that was there, which becomes empty. OSError."""
        with self._parent(path) as (parent, name):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, mode, dir_fd=parent)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def make_directory(self, path: str, mode: int) -> None:
        """One that is there already is success. OSError."""
        try:
            with self.opened(path, os.O_PATH | os.O_DIRECTORY):
                return
        except FileNotFoundError:
            with self._parent(path) as (parent, name):
                os.mkdir(name, mode, dir_fd=parent)

    def make_link(self, path: str, target: str) -> None:
        """In place of a file or link that is there. OSError."""
        with self._parent(path) as (parent, name):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
            os.symlink(target, name, dir_fd=parent)

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        """The directory that something is to be changed in, and its name there. OSError when it is read-only."""
        directory, name = posixpath.split(self.normal(path))
        if self.preopen(path) in self._readonly:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        with self.opened(directory, os.O_PATH | os.O_DIRECTORY) as parent:
            yield parent, name

    def status(self, path: str, *, follow: bool) -> Status:
        """Of the file, or of the symlink itself. OSError."""
        try:
            with self.opened(path, os.O_PATH | (0 if follow else os.O_NOFOLLOW)) as descriptor:
                return _status(os.fstat(descriptor))
        except FileNotFoundError:
            if not self._is_on_the_way(path):
                raise
            return _ON_THE_WAY

    def link(self, path: str) -> str:
        """Where a symlink leads. OSError."""
        with self.opened(path, os.O_PATH | os.O_NOFOLLOW) as descriptor:
            return os.readlink("", dir_fd=descriptor)

    def names(self, path: str) -> list[str]:
        """What is in a directory, the preopens in it too, sorted. OSError."""
        below = self._below(path)
        try:
            with self.opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
                below.update(os.listdir(descriptor))  # noqa: PTH208  a descriptor, no path
        except FileNotFoundError:
            if not self._is_on_the_way(path):
                raise
        return sorted(below)

    def _is_on_the_way(self, path: str) -> bool:
        """Whether there is such a directory without a file system: the way to preopens, and the root."""
        return self.normal(path) == "/" or bool(self._below(path))

    def _below(self, path: str) -> set[str]:
        """The names that lead to preopens below `path`."""
        wanted = self.normal(path)
        inner = (_beneath(guest, wanted) for guest in self._roots if guest != wanted)
        return {rest.partition("/")[0] for rest in inner if rest}


def _beneath(path: str, directory: str) -> str | None:
    """`path` relative to `directory`, empty for itself; None when it is not in there."""
    if path == directory:
        return ""
    prefix = directory.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def _open(directory: int, path: str, flags: int) -> int:
    for attempt in range(_TRIES):
        try:
            return libc.openat2(directory, path, flags, libc.RESOLVE_BENEATH | libc.RESOLVE_NO_MAGICLINKS)
        except BlockingIOError:  # something was renamed while the kernel resolved it
            if attempt == _TRIES - 1:
                raise
        except OSError as error:
            number = error.errno or errno.EIO
            text = _LEADS_OUT if number == errno.EXDEV else os.strerror(number)
            raise OSError(number, text) from None
    raise AssertionError


def _status(found: os.stat_result) -> Status:
    return Status(
        mode=found.st_mode,
        size=found.st_size,
        blocks=found.st_blocks,
        block_size=found.st_blksize,
        inode=found.st_ino,
        links=found.st_nlink,
        uid=found.st_uid,
        gid=found.st_gid,
        read_ns=found.st_atime_ns,
        modified_ns=found.st_mtime_ns,
        changed_ns=found.st_ctime_ns,
    )
