"""Paths of a component, resolved below a directory that it has been given (openat2(2)): nothing else can be reached.

Invariant: what leads out of the directory, by `..`, by a symbolic link or by being absolute, is `not-permitted`, as
with the engine's own file system; the last name of a path is never followed by a call that takes a name.
"""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from cri_shim.kernel import libc
from handlers.wasmtime.wasip2.descriptors import allowed
from handlers.wasmtime.wasip2.interface import Failure

_T = TypeVar("_T")

_RULES: Final = libc.RESOLVE_BENEATH | libc.RESOLVE_NO_MAGICLINKS
_ATTEMPTS: Final = 32
"""A rename elsewhere makes the kernel give up, and say so with EAGAIN."""
_MOST_LINKS: Final = 40
_CODES: Final = {
    errno.EACCES: "access",
    errno.EAGAIN: "would-block",
    errno.EALREADY: "already",
    errno.EBADF: "bad-descriptor",
    errno.EBUSY: "busy",
    errno.EDEADLK: "deadlock",
    errno.EDQUOT: "quota",
    errno.EEXIST: "exist",
    errno.EFBIG: "file-too-large",
    errno.EILSEQ: "illegal-byte-sequence",
    errno.EINPROGRESS: "in-progress",
    errno.EINTR: "interrupted",
    errno.EINVAL: "invalid",
    errno.EISDIR: "is-directory",
    errno.ELOOP: "loop",
    errno.EMLINK: "too-many-links",
    errno.EMSGSIZE: "message-size",
    errno.ENAMETOOLONG: "name-too-long",
    errno.ENODEV: "no-device",
    errno.ENOENT: "no-entry",
    errno.ENOLCK: "no-lock",
    errno.ENOMEM: "insufficient-memory",
    errno.ENOSPC: "insufficient-space",
    errno.ENOTDIR: "not-directory",
    errno.ENOTEMPTY: "not-empty",
    errno.ENOTRECOVERABLE: "not-recoverable",
    errno.ENOTSUP: "unsupported",
    errno.ENOTTY: "no-tty",
    errno.ENXIO: "no-such-device",
    errno.EOVERFLOW: "overflow",
    errno.EPERM: "not-permitted",
    errno.EPIPE: "pipe",
    errno.EROFS: "read-only",
    errno.ESPIPE: "invalid-seek",
    errno.ETXTBSY: "text-file-busy",
    errno.EXDEV: "cross-device",
}


def error_code(error: OSError) -> str:
    """`error-code`."""
    return _CODES.get(error.errno or 0, "io")


def tried(call: Callable[[], _T]) -> _T:
    """What a system call gives. Failure with the code of its error."""
    try:
        return call()
    except OSError as error:
        raise Failure(error_code(error)) from None


def opened(directory: int, path: str, flags: int, mode: int = 0) -> int:
    """Open what `path` means below `directory`. Failure."""
    if "\0" in path:
        raise Failure("invalid")
    attempts = _ATTEMPTS
    while True:
        try:
            return allowed(libc.openat2(directory, path, flags, _RULES, mode))
        except OSError as error:
            attempts -= 1
            if error.errno == errno.EXDEV:
                raise Failure("not-permitted") from None
            if error.errno != errno.EAGAIN or not attempts:
                raise Failure(error_code(error)) from None


@contextmanager
def parent(directory: int, path: str) -> Iterator[tuple[int, str]]:
    """The directory that holds what `path` means, and its name there. Failure, also for `..` and the like."""
    base, _, name = path.rstrip("/").rpartition("/")
    if not path:
        raise Failure("no-entry")
    if path.startswith("/"):
        raise Failure("not-permitted")
    if name in {".", ".."} or "\0" in path:
        raise Failure("invalid")
    fd = opened(directory, base or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd, name
    finally:
        os.close(fd)


def followed(directory: int, path: str) -> str:
    """The path without symbolic links as its last name. Failure."""
    for _ in range(_MOST_LINKS):
        fd = opened(directory, path, os.O_PATH | os.O_NOFOLLOW)
        try:
            target = os.readlink("", dir_fd=fd)
        except OSError:
            return path  # no link
        finally:
            os.close(fd)
        path = posixpath.join(posixpath.dirname(path.rstrip("/")), target)
    raise Failure("loop")
