"""`wasi:filesystem`: the directories of the container, for components whose streams are ours.

Calls are the kernel's, made by the guest's thread with the container's identity. Invariant: nothing outside of a
preopened directory is reached (`filesystem_paths`), and nothing is changed through one that is read-only.
"""

from __future__ import annotations

import os
import stat as stats
import time
from collections.abc import Iterator
from typing import Any, Final

from handlers.wasmtime.wasip2 import filesystem_paths as paths
from handlers.wasmtime.wasip2.descriptors import allowed
from handlers.wasmtime.wasip2.filesystem_paths import tried
from handlers.wasmtime.wasip2.interface import Failure, Interface, methods
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.streams import (
    CHUNK,
    PERMIT,
    InputStream,
    IoError,
    OutputStream,
    StreamClosed,
    StreamFailed,
)
from handlers.wasmtime.wasip2.waiter import Always, Source, Waiter
from handlers.wasmtime.wasip2.world import Directory, World

_BILLION: Final = 1_000_000_000
_MASK: Final = (1 << 64) - 1
_LARGEST: Final = (1 << 63) - 1
_TYPES: Final = {
    stats.S_IFBLK: "block-device",
    stats.S_IFCHR: "character-device",
    stats.S_IFDIR: "directory",
    stats.S_IFIFO: "fifo",
    stats.S_IFLNK: "symbolic-link",
    stats.S_IFREG: "regular-file",
    stats.S_IFSOCK: "socket",
}
_ADVICE: Final = {
    "normal": os.POSIX_FADV_NORMAL,
    "sequential": os.POSIX_FADV_SEQUENTIAL,
    "random": os.POSIX_FADV_RANDOM,
    "will-need": os.POSIX_FADV_WILLNEED,
    "dont-need": os.POSIX_FADV_DONTNEED,
    "no-reuse": os.POSIX_FADV_NOREUSE,
}
_SYNC: Final = {
    "file-integrity-sync": os.O_SYNC,
    "data-integrity-sync": os.O_DSYNC,
    "requested-write-sync": os.O_RSYNC,
}
_NewTime = tuple[str, Any]
"""`new-timestamp`."""


class _Handle:
    """A descriptor of the kernel and how many hold it: the file, and the streams over it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._holders = 0

    def hold(self) -> _Handle:
        self._holders += 1
        return self

    def release(self) -> None:
        self._holders -= 1
        if not self._holders:
            os.close(self.fd)


class FileInput(InputStream):
    """A file from some offset on."""

    def __init__(self, waiter: Waiter, handle: _Handle, offset: int) -> None:
        super().__init__(waiter)
        self._handle = handle.hold()
        self._offset = offset

    def receive(self, size: int) -> bytes:
        """`InputStream`."""
        try:
            data = os.pread(self._handle.fd, size, self._offset) if self._offset <= _LARGEST else b""
        except OSError as error:
            raise StreamFailed(str(error), error) from None
        if not data:
            raise StreamClosed
        self._offset += len(data)
        return data

    def source(self) -> Source:
        """`InputStream`."""
        return Always()

    def close(self) -> None:
        """`Resource`."""
        self._handle.release()


class FileOutput(OutputStream):
    """A file from some offset on, or at its end: None."""

    def __init__(self, waiter: Waiter, handle: _Handle, offset: int | None) -> None:
        super().__init__(waiter)
        self._handle = handle.hold()
        self._offset = offset

    def capacity(self) -> int:
        """`OutputStream`."""
        return PERMIT

    def send(self, data: bytes) -> None:
        """`OutputStream`."""
        rest = memoryview(data)
        try:
            while rest:
                if self._offset is None:
                    rest = rest[os.pwritev(self._handle.fd, (rest,), 0, os.RWF_APPEND) :]
                else:
                    size = os.pwrite(self._handle.fd, rest, self._offset)
                    self._offset += size
                    rest = rest[size:]
        except (OSError, OverflowError) as error:
            raise StreamFailed(str(error), error) from None

    def source(self) -> Source:
        """`OutputStream`."""
        return Always()

    def close(self) -> None:
        """`Resource`."""
        self._handle.release()


class DirectoryEntries(Resource, resource=True):
    """`directory-entry-stream`."""

    def __init__(self, entries: Iterator[dict[str, str]]) -> None:
        self._entries = entries

    def read_directory_entry(self) -> dict[str, str] | None:
        """`directory-entry-stream.read-directory-entry`."""
        return next(self._entries, None)


class Descriptor(Resource, resource=True):
    """`descriptor`: a file or a directory. `writes` is what it was opened for; `readonly` comes from the preopen."""

    def __init__(self, waiter: Waiter, fd: int, *, reads: bool, writes: bool, readonly: bool) -> None:
        self._waiter = waiter
        self._handle = _Handle(fd).hold()
        self._is_directory = stats.S_ISDIR(os.fstat(fd).st_mode)
        self._reads = reads
        self._writes = writes
        self._readonly = readonly

    @property
    def _fd(self) -> int:
        return self._handle.fd

    def read_via_stream(self, offset: int) -> FileInput:
        """`descriptor.read-via-stream`."""
        if self._is_directory:
            raise Failure("is-directory")
        return FileInput(self._waiter, self._handle, offset)

    def write_via_stream(self, offset: int) -> FileOutput:
        """`descriptor.write-via-stream`."""
        return FileOutput(self._waiter, self._writable(), offset)

    def append_via_stream(self) -> FileOutput:
        """`descriptor.append-via-stream`."""
        return FileOutput(self._waiter, self._writable(), None)

    def advise(self, offset: int, length: int, advice: str) -> None:
        """`descriptor.advise`."""
        handle = self._file()
        tried(lambda: os.posix_fadvise(handle.fd, min(offset, _LARGEST), min(length, _LARGEST), _ADVICE[advice]))

    def sync_data(self) -> None:
        """`descriptor.sync-data`."""
        self._synchronize(os.fdatasync)

    def sync(self) -> None:
        """`descriptor.sync`."""
        self._synchronize(os.fsync)

    def get_flags(self) -> set[str]:
        """`descriptor.get-flags`."""
        flags = {"read"} if self._reads else set()
        if self._is_directory:
            return flags if self._readonly else flags | {"mutate-directory"}
        return flags | {"write"} if self._writes else flags

    def get_type(self) -> str:
        """`descriptor.get-type`."""
        return _type(tried(lambda: os.fstat(self._fd)).st_mode)

    def set_size(self, size: int) -> None:
        """`descriptor.set-size`."""
        handle = self._writable()
        if size > _LARGEST:
            raise Failure("file-too-large")
        tried(lambda: os.ftruncate(handle.fd, size))

    def set_times(self, accessed: _NewTime, modified: _NewTime) -> None:
        """`descriptor.set-times`."""
        self._refuse_readonly()
        times = _times(accessed, modified, tried(lambda: os.fstat(self._fd)))
        if self._is_directory:  # which is open for its path alone
            tried(lambda: os.utime(".", ns=times, dir_fd=self._fd))
        else:
            tried(lambda: os.utime(self._fd, ns=times))

    def read(self, length: int, offset: int) -> tuple[bytes, bool]:
        """`descriptor.read`."""
        handle = self._file()
        if not length or offset > _LARGEST:
            return b"", bool(length)
        data = tried(lambda: os.pread(handle.fd, min(length, CHUNK), offset))
        return data, not data

    def write(self, data: bytes, offset: int) -> int:
        """`descriptor.write`."""
        handle = self._writable()
        if offset > _LARGEST:
            raise Failure("file-too-large")
        return tried(lambda: os.pwrite(handle.fd, data, offset))

    def read_directory(self) -> DirectoryEntries:
        """`descriptor.read-directory`."""
        self._refuse_file()
        fd = paths.opened(self._fd, ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return DirectoryEntries(iter(tried(lambda: list(_entries(fd)))))
        finally:
            os.close(fd)

    def create_directory_at(self, path: str) -> None:
        """`descriptor.create-directory-at`."""
        self._refuse_change()
        with paths.parent(self._fd, path) as (fd, name):
            tried(lambda: os.mkdir(name, dir_fd=fd))

    def stat(self) -> dict[str, Any]:
        """`descriptor.stat`."""
        return _stat(tried(lambda: os.fstat(self._fd)))

    def stat_at(self, flags: frozenset[str], path: str) -> dict[str, Any]:
        """`descriptor.stat-at`."""
        return _stat(self._looked_at(flags, path))

    def set_times_at(self, flags: frozenset[str], path: str, accessed: _NewTime, modified: _NewTime) -> None:
        """`descriptor.set-times-at`."""
        self._refuse_change()
        times = _times(accessed, modified, self._looked_at(flags, path))
        final = paths.followed(self._fd, path) if "symlink-follow" in flags else path
        if final.rstrip("/") in {"", "."}:
            self.set_times(accessed, modified)
            return
        with paths.parent(self._fd, final) as (fd, name):
            tried(lambda: os.utime(name, ns=times, dir_fd=fd, follow_symlinks=False))

    def link_at(self, flags: frozenset[str], path: str, target: Descriptor, new_path: str) -> None:
        """`descriptor.link-at`."""
        self._refuse_change()
        target._refuse_change()
        if "symlink-follow" in flags:
            raise Failure("invalid")  # as with the engine's own file system
        with paths.parent(self._fd, path) as (fd, name), paths.parent(target._fd, new_path) as (new_fd, new_name):
            tried(lambda: os.link(name, new_name, src_dir_fd=fd, dst_dir_fd=new_fd, follow_symlinks=False))

    def open_at(self, follow: frozenset[str], path: str, how: frozenset[str], wanted: frozenset[str]) -> Descriptor:
        """`descriptor.open-at`."""
        self._refuse_file()
        if "directory" in how and how - {"directory"}:
            raise Failure("invalid")
        writes = "write" in wanted or bool(how & {"create", "truncate"})
        if writes and self._readonly:
            raise Failure("not-permitted")
        flags = _open_flags(follow, how, wanted, writes=writes)
        fd = paths.opened(self._fd, path, flags, 0o666 if "create" in how else 0)
        reads = "read" in wanted or not writes
        return Descriptor(self._waiter, fd, reads=reads, writes=writes, readonly=self._readonly)

    def readlink_at(self, path: str) -> str:
        """`descriptor.readlink-at`."""
        self._refuse_file()
        with paths.parent(self._fd, path) as (fd, name):
            return _text(tried(lambda: os.readlink(name, dir_fd=fd)))

    def remove_directory_at(self, path: str) -> None:
        """`descriptor.remove-directory-at`."""
        self._refuse_change()
        with paths.parent(self._fd, path) as (fd, name):
            tried(lambda: os.rmdir(name, dir_fd=fd))

    def rename_at(self, path: str, target: Descriptor, new_path: str) -> None:
        """`descriptor.rename-at`."""
        self._refuse_change()
        target._refuse_change()
        with paths.parent(self._fd, path) as (fd, name), paths.parent(target._fd, new_path) as (new_fd, new_name):
            tried(lambda: os.rename(name, new_name, src_dir_fd=fd, dst_dir_fd=new_fd))

    def symlink_at(self, target: str, path: str) -> None:
        """`descriptor.symlink-at`."""
        self._refuse_change()
        if target.startswith("/"):
            raise Failure("not-permitted")
        if not target or "\0" in target:
            raise Failure("invalid")
        with paths.parent(self._fd, path) as (fd, name):
            tried(lambda: os.symlink(target, name, dir_fd=fd))

    def unlink_file_at(self, path: str) -> None:
        """`descriptor.unlink-file-at`."""
        self._refuse_change()
        with paths.parent(self._fd, path) as (fd, name):
            tried(lambda: os.unlink(name, dir_fd=fd))

    def is_same_object(self, other: Descriptor) -> bool:
        """`descriptor.is-same-object`."""
        return os.path.samestat(os.fstat(self._fd), os.fstat(other._fd))

    def metadata_hash(self) -> dict[str, int]:
        """`descriptor.metadata-hash`."""
        return _hash(tried(lambda: os.fstat(self._fd)))

    def metadata_hash_at(self, flags: frozenset[str], path: str) -> dict[str, int]:
        """`descriptor.metadata-hash-at`."""
        return _hash(self._looked_at(flags, path))

    def close(self) -> None:
        """`Resource`."""
        self._handle.release()

    def _looked_at(self, flags: frozenset[str], path: str) -> os.stat_result:
        self._refuse_file()
        fd = paths.opened(self._fd, path, os.O_PATH | (0 if "symlink-follow" in flags else os.O_NOFOLLOW))
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _synchronize(self, how: Any) -> None:
        if not self._is_directory:
            tried(lambda: how(self._fd))
            return
        fd = paths.opened(self._fd, ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            tried(lambda: how(fd))
        finally:
            os.close(fd)

    def _file(self) -> _Handle:
        if self._is_directory:
            raise Failure("bad-descriptor")
        return self._handle

    def _writable(self) -> _Handle:
        handle = self._file()
        self._refuse_readonly()
        return handle

    def _refuse_file(self) -> None:
        if not self._is_directory:
            raise Failure("not-directory")

    def _refuse_readonly(self) -> None:
        if self._readonly:
            raise Failure("not-permitted")

    def _refuse_change(self) -> None:
        self._refuse_file()
        self._refuse_readonly()


def _open_flags(follow: frozenset[str], how: frozenset[str], wanted: frozenset[str], *, writes: bool) -> int:
    writing = os.O_RDWR if "read" in wanted else os.O_WRONLY
    flags = writing if writes else os.O_RDONLY
    flags |= os.O_NOCTTY | os.O_NONBLOCK  # a FIFO must not hold the guest up before anybody can poll
    flags |= 0 if "symlink-follow" in follow else os.O_NOFOLLOW
    for name, flag in (("create", os.O_CREAT), ("exclusive", os.O_EXCL), ("truncate", os.O_TRUNC)):
        flags |= flag if name in how else 0
    flags |= os.O_DIRECTORY if "directory" in how else 0
    for name, flag in _SYNC.items():
        flags |= flag if name in wanted else 0
    return flags


def _entries(fd: int) -> Iterator[dict[str, str]]:
    with os.scandir(fd) as found:
        for entry in found:
            if entry.is_symlink():
                kind = "symbolic-link"
            elif entry.is_dir():
                kind = "directory"
            elif entry.is_file():
                kind = "regular-file"
            else:
                kind = _type(entry.stat(follow_symlinks=False).st_mode)
            yield {"type": kind, "name": _text(entry.name)}


def _text(name: str) -> str:
    """A name of a file, which is bytes to the kernel."""
    if not name.isprintable() and any("\udc80" <= character <= "\udcff" for character in name):
        raise Failure("illegal-byte-sequence")
    return name


def _type(mode: int) -> str:
    return _TYPES.get(stats.S_IFMT(mode), "unknown")


def _stat(found: os.stat_result) -> dict[str, Any]:
    return {
        "type": _type(found.st_mode),
        "link-count": found.st_nlink,
        "size": found.st_size,
        "data-access-timestamp": _datetime(found.st_atime_ns),
        "data-modification-timestamp": _datetime(found.st_mtime_ns),
        "status-change-timestamp": _datetime(found.st_ctime_ns),
    }


def _datetime(nanoseconds: int) -> dict[str, int] | None:
    seconds, rest = divmod(nanoseconds, _BILLION)
    return {"seconds": seconds, "nanoseconds": rest} if seconds >= 0 else None


def _times(accessed: _NewTime, modified: _NewTime, now: os.stat_result) -> tuple[int, int]:
    return _time(accessed, now.st_atime_ns), _time(modified, now.st_mtime_ns)


def _time(wanted: _NewTime, before: int) -> int:
    kind, value = wanted
    if kind == "no-change":
        return before
    if kind == "now":
        return time.time_ns()
    nanoseconds: int = value["seconds"] * _BILLION + value["nanoseconds"]
    if nanoseconds > _LARGEST:
        raise Failure("overflow")
    return nanoseconds


def _hash(found: os.stat_result) -> dict[str, int]:
    """What is the same as long as it is the same file: libraries make an inode number of it."""
    file = (found.st_dev, found.st_ino)
    return {"lower": hash(file) & _MASK, "upper": hash((*file, 1)) & _MASK}


def interface(_world: World) -> Interface:
    """`wasi:filesystem/types`."""

    def filesystem_error_code(error: IoError) -> str | None:
        return paths.error_code(error.cause) if isinstance(error.cause, OSError) else None

    return Interface(
        {
            "descriptor": Descriptor,
            "directory-entry-stream": DirectoryEntries,
            "input-stream": InputStream,
            "output-stream": OutputStream,
            "error": IoError,
        },
        {
            "filesystem-error-code": filesystem_error_code,
            **methods("directory-entry-stream", DirectoryEntries, "read-directory-entry"),
            **methods(
                "descriptor",
                Descriptor,
                *("read-via-stream", "write-via-stream", "append-via-stream", "advise", "sync-data", "get-flags"),
                *("get-type", "set-size", "set-times", "read", "write", "read-directory", "sync"),
                *("create-directory-at", "stat", "stat-at", "set-times-at", "link-at", "open-at", "readlink-at"),
                *("remove-directory-at", "rename-at", "symlink-at", "unlink-file-at", "is-same-object"),
                *("metadata-hash", "metadata-hash-at"),
            ),
        },
    )


def preopens(world: World) -> Interface:
    """`wasi:filesystem/preopens`."""

    def given(there: Directory) -> tuple[Descriptor, str]:
        fd = tried(lambda: allowed(os.dup(there.fd)))
        return Descriptor(world.waiter, fd, reads=True, writes=False, readonly=there.readonly), there.name

    def get_directories() -> list[tuple[Descriptor, str]]:
        return [given(there) for there in world.directories]

    return Interface({"descriptor": Descriptor}, {"get-directories": get_directories})
