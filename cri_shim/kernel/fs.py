"""Files: atomic writes, safe removal and reading below a root that somebody else controls, disk usage, locks.

All of it blocks: call it in a thread. Invariant: no function follows a symlink out of the tree it was given.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from cri_shim.kernel import libc
from cri_shim.model.errors import InvalidArgument

_BLOCK: Final = 512
"""Bytes of one unit of st_blocks (stat(2))."""
_RESOLVE_TRIES: Final = 32
_DEPTH: Final = 8
"""Directories of a tree that are open at once while it is removed."""
# linux/fs.h: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_TOPDIR_FL (chattr +T)
_GET_FLAGS: Final = 0x80086601
_SET_FLAGS: Final = 0x40086602
_TOP_DIRECTORY: Final = 0x00020000


def atomic_write(path: Path, data: bytes, mode: int = 0o644, *, sync: bool = False) -> None:
    """Replace `path` by a file with these bytes and exactly this mode; readers see the old or the new one.

    `sync` makes it survive a power cut (fsync of the file and of its directory).
    """
    scratch = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            os.fchmod(fd, mode)
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            if sync:
                os.fsync(fd)
        scratch.rename(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if sync:
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make renames, new names and removals in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def spread_children(path: Path) -> None:
    """Have the file system place each directory in `path` apart from the others, where it knows how to (ext4).

    Writers of different directories do not wait for each other then, and new files do not search for their inodes
    among those of a directory that has just been removed, which ext4 keeps back for a minute (`recently_deleted`).
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            flags = int.from_bytes(fcntl.ioctl(fd, _GET_FLAGS, bytes(8)), sys.byteorder)
            fcntl.ioctl(fd, _SET_FLAGS, (flags | _TOP_DIRECTORY).to_bytes(8, sys.byteorder))
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove `path` and all below it; gone is success, a symlink is removed and not followed.

    OSError EBUSY when a mount is at or below `path`, with nothing removed if it is at most one directory deep; what is
    mounted is never touched. Depth does not matter: what lies deeper than _DEPTH is moved up to the top first, so a
    tree nested by a hostile image costs neither stack nor descriptors.
    """
    try:
        top = _open_top(path)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        path.unlink(missing_ok=True)
        return
    try:
        for name in _directories(top):
            os.close(_open_directory(name, top))
        while _remove_contents(top, top, _DEPTH):
            pass
    except OSError as error:
        # The names below are relative, and some are our own by now.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(top)
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()


def _open_top(path: Path) -> int:
    parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _open_directory(path.name, parent)
    finally:
        os.close(parent)


def _open_directory(name: str, parent: int) -> int:
    """OSError EBUSY when something is mounted on it: the kernel knows, where the mount table would have to be read."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return libc.openat2(parent, name, flags, libc.RESOLVE_NO_XDEV)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise OSError(errno.EBUSY, f"not removed: {name} is mounted there", name) from error


def _directories(directory: int) -> list[str]:
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _emptied_of_files(directory: int) -> Iterator[str]:
    """Unlink what is not a directory; yield the names of the directories."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry.name
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.name, dir_fd=directory)


def _remove_contents(directory: int, top: int, depth: int) -> bool:
    """Remove all in it but what lies deeper than `depth`: True when there is such, which is in `top` then."""
    moved = False
    for name in list(_emptied_of_files(directory)):
        if depth == 0:
            os.rename(name, secrets.token_hex(8), src_dir_fd=directory, dst_dir_fd=top)
            moved = True
            continue
        with contextlib.suppress(FileNotFoundError):
            child = _open_directory(name, directory)
            try:
                moved |= _remove_contents(child, top, depth - 1)
            finally:
                os.close(child)
            os.rmdir(name, dir_fd=directory)
    return moved


def usage(path: Path, pause: Callable[[], object] = lambda: None) -> tuple[int, int]:
    """Allocated bytes and number of inodes at and below `path`; hard links count once, gone is (0, 0).

    What vanishes meanwhile, or lies deeper than a path may be long, is left out. `pause` is called before each
    directory.
    """
    total, inodes = 0, 0
    seen: set[tuple[int, int]] = set()
    pending = [os.fspath(path)]
    while pending:
        pause()
        directory = pending.pop()
        with contextlib.suppress(OSError):
            for status in _statuses(directory, pending):
                identity = (status.st_dev, status.st_ino)
                if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                    if identity in seen:
                        continue
                    seen.add(identity)
                total += status.st_blocks * _BLOCK
                inodes += 1
    return total, inodes


def _statuses(directory: str, pending: list[str]) -> Iterator[os.stat_result]:
    """The directory's own status and those of its files; subdirectories are appended to `pending`."""
    yield os.lstat(directory)
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False)


def open_in_root(root: Path, path: str | Path, flags: int) -> int:
    """Open `path` as a process chrooted into `root` would: absolute links and `..` stay inside (openat2(2))."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(_RESOLVE_TRIES - 1):
            # EAGAIN: something was renamed while the kernel resolved a `..`.
            with contextlib.suppress(BlockingIOError):
                return _resolve(directory, path, flags)
        return _resolve(directory, path, flags)
    finally:
        os.close(directory)


def _resolve(directory: int, path: str | Path, flags: int) -> int:
    return libc.openat2(directory, path, flags, libc.RESOLVE_IN_ROOT | libc.RESOLVE_NO_MAGICLINKS)


def read_in_root(root: Path, path: str | Path, limit: int) -> bytes | None:
    """The bytes of a regular file below a root that is not trusted; None when there is no such file.

    InvalidArgument for a FIFO, device, socket or directory (never opened for reading: that alone can have effects), for
    links without an end and for more than `limit` bytes.
    """
    try:
        handle = open_in_root(root, path, os.O_PATH)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno not in {errno.ELOOP, errno.ENAMETOOLONG}:
            raise
        msg = f"{path} in the image: {os.strerror(error.errno)}"
        raise InvalidArgument(msg) from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            msg = f"{path} in the image is not a regular file"
            raise InvalidArgument(msg)
        data = _read(f"/proc/thread-self/fd/{handle}", limit + 1)
    finally:
        os.close(handle)
    if len(data) > limit:
        msg = f"{path} in the image is larger than {limit} bytes"
        raise InvalidArgument(msg)
    return data


def _read(path: str, limit: int) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123  a link to a descriptor, no path
        return file.read(limit)


def lock_exclusive(path: Path) -> int | None:
    """Take flock(2) on a file, made when missing: the descriptor that holds it, or None when another process does.

    A child that inherits the descriptor holds the lock too.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd
