"""Namespaces: pin a pod's as files, enter one in a throw-away thread.

Not the making of user namespaces, which no thread can unshare (`cri_shim.kernel.user_namespace`), and not for PID
namespaces, which live with their first process.
Invariant: only throw-away threads change namespaces; the loop and the pools stay where the daemon was started.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from cri_shim.kernel import libc, mounts, new_namespaces, threads
from cri_shim.model.errors import FailedPrecondition

T = TypeVar("T")

_PLACEHOLDER_BYTES: Final = 1 << 20
_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")


def pin_namespaces(
    directory: Path, *, net: bool, ipc: bool, uts: bool, hostname: str, sysctls: Mapping[str, str]
) -> None:
    """Make new namespaces of the wanted kinds and bind them on `directory`/{net,ipc,uts}. Blocks for about 1 ms.

    They are set up as `new_namespaces.enter_new` says. InvalidArgument for a sysctl that is unknown, refused, or not
    owned by a namespace made here. On failure nothing of them is left; pins of other kinds stay as they are.
    """
    kinds = [kind for kind, wanted in (("net", net), ("ipc", ipc), ("uts", uts)) if wanted]
    new_namespaces.check_sysctls(sysctls, kinds)

    def make() -> None:
        new_namespaces.enter_new(kinds, hostname, sysctls)
        for kind in kinds:
            pin = directory / kind
            pin.touch(mode=0o400)
            mounts.bind(Path("/proc/thread-self/ns", kind), pin)

    directory.mkdir(parents=True, exist_ok=True)
    try:
        threads.call_in_new_thread(make)
    except BaseException:
        for kind in kinds:
            _drop(directory / kind)
        with contextlib.suppress(OSError):  # there are others
            directory.rmdir()
        raise


def unpin(directory: Path) -> None:
    """Drop all pins in `directory` and the directory; what is gone already is success."""
    with contextlib.suppress(FileNotFoundError):
        for pin in directory.iterdir():
            _drop(pin)
        directory.rmdir()


def _drop(pin: Path) -> None:
    mounts.unmount_all(pin)
    pin.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(namespace: Path) -> Generator[int]:
    try:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        msg = f"namespace {namespace} is gone"
        raise FailedPrecondition(msg, hint="the node was restarted, or the pod has been stopped") from error
    try:
        yield fd
    finally:
        os.close(fd)


def enter_mount_namespace(path: Path) -> Callable[[], None]:
    """For `process.spawn(enter=…)`: the child starts in the mount namespace pinned at `path`."""

    def enter() -> None:
        with _opened(path) as fd:
            libc.unshare(libc.CLONE_FS)  # the kernel refuses a thread that shares its cwd
            libc.setns(fd, libc.CLONE_NEWNS)

    return enter


def fresh_mount_namespace_without(paths: Sequence[Path]) -> Callable[[], None]:
    """For `process.spawn(enter=…)`: the child gets a copy of the mount table that lacks `paths` in /sys/fs/cgroup.

    Only the cgroup mounts become private there; all others keep their propagation. An empty tmpfs takes the place of
    each: what a program that takes it for a cgroup hierarchy makes there (crun does) goes with the namespace.
    """

    def enter() -> None:
        libc.unshare(libc.CLONE_NEWNS)
        libc.mount(None, _CGROUP_ROOT, None, libc.MS_PRIVATE | libc.MS_REC)
        for path in paths:
            mounts.unmount(path)
            mounts.tmpfs(path, size=_PLACEHOLDER_BYTES, mode=0o755)

    return enter


def pin_mount_namespace(pin: Path, without: Sequence[Path]) -> None:
    """Make such a namespace once and bind it on `pin`, whose directory becomes a private mount of itself.

    A namespace that is pinned there already is kept. Blocks.
    """
    pin.parent.mkdir(parents=True, exist_ok=True)
    # Private: a shared pin would propagate into the very namespace that it pins, which the kernel refuses.
    mounts.make_private(pin.parent)
    if mounts.is_mount_point(pin):
        return
    pin.touch(mode=0o400)
    for cpu in sorted(os.sched_getaffinity(0)):
        # The kernel binds only namespaces with a higher id than the caller's own, against loops. Since Linux 6.18 each
        # CPU hands out ids from a batch of its own: the CPU that made the caller's namespace always has a higher one.
        with contextlib.suppress(_IdTooLow):
            _bind_new_mount_namespace(pin, without, cpu)
            return
    pin.unlink()
    raise OSError(errno.EINVAL, "mount: no CPU makes a mount namespace that can be pinned", os.fspath(pin))


class _IdTooLow(Exception):
    """The kernel refused the bind of a mount namespace, as one that might hold itself."""


def _bind_new_mount_namespace(pin: Path, without: Sequence[Path], cpu: int) -> None:
    enter = fresh_mount_namespace_without(without)

    def make() -> int:
        os.sched_setaffinity(0, {cpu})
        enter()
        return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    # Bound from outside: a namespace cannot hold a bind of itself.
    made = threads.call_in_new_thread(make)
    try:
        mounts.bind(Path(f"/proc/self/fd/{made}"), pin)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise _IdTooLow from error
        raise
    finally:
        os.close(made)


def run_in_netns(path: Path, function: Callable[[], T]) -> T:
    """Run `function` in a throw-away thread inside the network namespace pinned at `path`. Blocks.

    Sockets made there keep that namespace. FailedPrecondition when the namespace is gone.
    """
    return threads.call_in_new_thread(_in_netns(path, function))


async def await_in_netns(path: Path, function: Callable[[], T]) -> T:
    """The same without blocking the loop."""
    return await threads.await_in_new_thread(_in_netns(path, function))


def _in_netns(path: Path, function: Callable[[], T]) -> Callable[[], T]:
    def body() -> T:
        with _opened(path) as fd:
            libc.setns(fd, libc.CLONE_NEWNET)
        return function()

    return body


def visit_netns(paths: Sequence[Path], function: Callable[[], T]) -> list[T | None]:
    """Run `function` inside each of the network namespaces, all in one throw-away thread. None for one that is gone."""

    def visit(path: Path) -> T | None:
        try:
            with _opened(path) as fd:
                libc.setns(fd, libc.CLONE_NEWNET)
            return function()
        except (FailedPrecondition, OSError):
            return None

    return threads.call_in_new_thread(lambda: [visit(path) for path in paths]) if paths else []
