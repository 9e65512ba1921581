"""The C library calls and raw system calls that Python 3.11 does not offer: one thin function each.

Not a place for policy: flags in, OSError (with the call's name and the path) out. Invariant: every call releases the
GIL (ctypes.CDLL does), so a slow mount never stops the event loop's thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from typing import Final

# linux/mount.h, linux/sched.h, linux/prctl.h, linux/openat2.h
MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MS_SHARED: Final = 1 << 20
MNT_DETACH: Final = 0x2
UMOUNT_NOFOLLOW: Final = 0x8

CLONE_FS: Final = 0x200
CLONE_NEWNS: Final = 0x20000
CLONE_NEWUTS: Final = 0x4000000
CLONE_NEWIPC: Final = 0x8000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000

_M_ARENA_MAX: Final = -8
_M_MMAP_THRESHOLD: Final = -3
_LARGE: Final = 1 << 20
_LARGE_CHUNK: Final = 100_000
"""Bytes, below what the C library makes a mapping for."""
_ALL_GAPS: Final = 8 << 20
"""Bytes at most, in case that it grows otherwise."""
_SMALL_CHUNK: Final = 4096
_CHUNK_STEP: Final = 16
"""Bytes between two sizes of chunks."""

_PR_SET_NAME: Final = 15
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37

_CLOSE_RANGE_CLOEXEC: Final = 4
_RESIDENT: Final = tuple(bytes((value,)) for value in range(1, 256, 2))
"""What mincore says of a page that is there: the other bits are undefined."""

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

OPEN_TREE_CLONE: Final = 1
AT_RECURSIVE: Final = 0x8000
AT_EMPTY_PATH: Final = 0x1000
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8
MOUNT_ATTR_ATIME: Final = 0x70
"""All bits of the one choice that the next three are of."""
MOUNT_ATTR_RELATIME: Final = 0
MOUNT_ATTR_NOATIME: Final = 0x10
MOUNT_ATTR_STRICTATIME: Final = 0x20
MOUNT_ATTR_NODIRATIME: Final = 0x80
MOUNT_ATTR_IDMAP: Final = 0x100000
FSOPEN_CLOEXEC: Final = 1
FSMOUNT_CLOEXEC: Final = 1
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_CMD_CREATE: Final = 6

# Numbers above 403 are the same on every architecture.
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_SYS_CLOSE_RANGE: Final = 436
_SYS_OPENAT2: Final = 437
_SYS_MOUNT_SETATTR: Final = 442

_AT_FDCWD: Final = -100
_SOCKADDR_SIZE: Final = 16
"""`struct sockaddr`; AF_UNSPEC is 0."""

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("mount", "setns", "unshare", "prctl", "capset"):
    getattr(_libc, _name)  # is looked up the first time, which no fork is to do for itself


class _OpenHow(ctypes.Structure):
    """`struct open_how` (linux/openat2.h)."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttr(ctypes.Structure):
    """`struct mount_attr` (linux/mount.h)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def oserror(syscall: str, path: str | os.PathLike[str] | None = None) -> OSError:
    """The current errno as an OSError whose text names the call, and the path where there is one."""
    number = ctypes.get_errno()
    text = f"{syscall}: {os.strerror(number)}"
    return OSError(number, text) if path is None else OSError(number, text, os.fspath(path))


def _encode(text: str | os.PathLike[str] | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def _raw(number: int, *args: object) -> int:
    if platform.machine() not in {"x86_64", "aarch64", "riscv64", "ppc64le", "s390x"}:
        ctypes.set_errno(38)  # ENOSYS: the numbers have not been checked for this machine
        return -1
    result: int = _libc.syscall(ctypes.c_long(number), *args)
    return result


def mount(
    source: str | os.PathLike[str] | None,
    target: str | os.PathLike[str],
    fstype: str | None,
    flags: int,
    data: str | None = None,
) -> None:
    """The system call of that name."""
    done = _libc.mount(_encode(source), _encode(target), _encode(fstype), ctypes.c_ulong(flags), _encode(data))
    if done != 0:
        raise oserror("mount", target)


def umount2(target: str | os.PathLike[str], flags: int) -> None:
    """The system call of that name."""
    if _libc.umount2(_encode(target), flags) != 0:
        raise oserror("umount2", target)


def setns(fd: int, kind: int) -> None:
    """Enter a namespace, in the calling thread; `os.setns` exists from Python 3.12 only."""
    if _libc.setns(fd, kind) != 0:
        raise oserror("setns")


def unshare(flags: int) -> None:
    """Leave shared namespaces, in the calling thread; `os.unshare` exists from Python 3.12 only."""
    if _libc.unshare(flags) != 0:
        raise oserror("unshare")


def sethostname(name: str) -> None:
    """Set the host name of the calling thread's UTS namespace."""
    encoded = os.fsencode(name)
    if _libc.sethostname(encoded, ctypes.c_size_t(len(encoded))) != 0:
        raise oserror(f"sethostname {name!r}")


def disconnect(fd: int) -> None:
    """Dissolve the association of a datagram socket: connect(2) with AF_UNSPEC, which Python's sockets cannot say."""
    address = (ctypes.c_char * _SOCKADDR_SIZE)()
    if _libc.connect(fd, address, ctypes.c_uint(_SOCKADDR_SIZE)) != 0:
        raise oserror("connect AF_UNSPEC")


def load_resolver() -> None:
    """Load what getaddrinfo(3) would load later by a path: before glibc 2.34 its parts are libraries of their own."""
    for name in ("libnss_files.so.2", "libnss_dns.so.2"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)


def share_heap() -> None:
    """Have threads that start from now on use the first one's heap (mallopt(3)); a C library without that has one."""
    with contextlib.suppress(AttributeError):
        _libc.mallopt(_M_ARENA_MAX, 1)


def fill_heap() -> None:
    """Take what is free in between of the C library's heap, so that what is allocated from now on lies together.

    For a process whose forks each have a copy of every page that they write to. Only where the heap grows upwards.
    """
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(ctypes.c_size_t(0))
        malloc, free = _libc["malloc"], _libc["free"]
        malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
        end, left = malloc(_LARGE_CHUNK) or 0, _ALL_GAPS
        for size in (*(_LARGE_CHUNK >> shift for shift in range(5)), *range(_SMALL_CHUNK, 0, -_CHUNK_STEP)):
            taken = malloc(size) or 0
            while 0 < taken < end and left > 0:
                left -= size
                taken = malloc(size) or 0
            free(taken)


def give_back_large() -> None:
    """Have what is over a mebibyte come from the kernel and go back there: else freeing it once makes it the heap's."""
    with contextlib.suppress(AttributeError):
        _libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)


def name_thread(name: bytes) -> None:
    """Name the calling thread, for ps(1) and top(1): 15 bytes at most count (prctl(2), PR_SET_NAME)."""
    if _libc.prctl(_PR_SET_NAME, name, 0, 0, 0) != 0:
        raise oserror("prctl PR_SET_NAME")


def prctl(option: int, argument: int) -> None:
    """The system call of that name, with one argument."""
    if _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        raise oserror(f"prctl {option}")


def capset(header: object, sets: object) -> None:
    """The system call of that name, for the calling thread; structures as in linux/capability.h."""
    if _libc.capset(header, sets) != 0:
        raise oserror("capset")


def resident(address: int, size: int) -> int:
    """How many bytes of a mapping of ours are in memory (mincore(2)); 0 for one that is not there any more."""
    if not size:
        return 0
    page = os.sysconf("SC_PAGE_SIZE")
    first = address - address % page
    pages = -(-(address + size - first) // page)
    found = ctypes.create_string_buffer(pages)
    if _libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(pages * page), found) != 0:
        return 0
    return min(size, sum(map(found.raw.count, _RESIDENT)) * page)


def close_range_on_exec(first: int) -> None:
    """Let exec close every descriptor from `first` on (close_range(2) with CLOSE_RANGE_CLOEXEC, Linux 5.11)."""
    if _raw(_SYS_CLOSE_RANGE, ctypes.c_uint(first), ctypes.c_uint(0xFFFF_FFFF), _CLOSE_RANGE_CLOEXEC) != 0:
        raise oserror("close_range")


def openat2(dirfd: int, path: str | os.PathLike[str], flags: int, resolve: int, mode: int = 0) -> int:
    """Open by rules for the resolution, and with O_CREAT create with `mode`. Returns a descriptor that exec closes."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    fd = _raw(_SYS_OPENAT2, dirfd, _encode(path), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
    if fd < 0:
        raise oserror("openat2", path)
    return fd


def open_tree(path: str | os.PathLike[str], flags: int) -> int:
    """Open a descriptor of the mount at `path`, or of a detached copy of it."""
    fd = _raw(_SYS_OPEN_TREE, _AT_FDCWD, _encode(path), ctypes.c_uint(flags | os.O_CLOEXEC))
    if fd < 0:
        raise oserror("open_tree", path)
    return fd


def move_mount(fd: int, target: str | os.PathLike[str] | int) -> None:
    """Attach the detached mount `fd` at `target`, a path or a descriptor."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (MOVE_MOUNT_T_EMPTY_PATH if isinstance(target, int) else 0)
    place, path = (target, b"") if isinstance(target, int) else (_AT_FDCWD, _encode(target))
    if _raw(_SYS_MOVE_MOUNT, fd, b"", place, path, ctypes.c_uint(flags)) != 0:
        raise oserror("move_mount", None if isinstance(target, int) else target)


def mount_setattr(
    fd: int,
    *,
    set_attributes: int,
    recursive: bool,
    clear_attributes: int = 0,
    propagation: int = 0,
    user_namespace: int = 0,
) -> None:
    """Change the mount `fd`, and those below it when `recursive`: attributes go, attributes come.

    `propagation` is one of MS_SHARED, MS_SLAVE, MS_PRIVATE, or 0 for no change. `user_namespace` is a descriptor
    of the one that MOUNT_ATTR_IDMAP maps by.
    """
    attr = _MountAttr(set_attributes, clear_attributes, propagation, user_namespace)
    flags = ctypes.c_uint(AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0))
    size = ctypes.c_size_t(ctypes.sizeof(attr))
    if _raw(_SYS_MOUNT_SETATTR, fd, b"", flags, ctypes.byref(attr), size) != 0:
        raise oserror("mount_setattr")


def fsopen(fstype: str) -> int:
    """The system call of that name."""
    fd = _raw(_SYS_FSOPEN, _encode(fstype), ctypes.c_uint(FSOPEN_CLOEXEC))
    if fd < 0:
        raise oserror(f"fsopen {fstype}")
    return fd


def fsconfig(fd: int, command: int, key: str | None = None, value: str | os.PathLike[str] | None = None) -> None:
    """Set a flag or a string of a new file system, or create it."""
    if _raw(_SYS_FSCONFIG, fd, ctypes.c_uint(command), _encode(key), _encode(value), 0) != 0:
        raise oserror(f"fsconfig {key or 'create'}", value)


def fsmount(fd: int, attributes: int) -> int:
    """Make a mount; returns a descriptor of the new, detached mount."""
    mounted = _raw(_SYS_FSMOUNT, fd, ctypes.c_uint(FSMOUNT_CLOEXEC), ctypes.c_uint(attributes))
    if mounted < 0:
        raise oserror("fsmount")
    return mounted
