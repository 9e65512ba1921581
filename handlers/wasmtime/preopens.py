"""The directories that a guest sees, from the root file system and the mounts of its container.

A directory is opened where it lies. WASI opens directories only, so a mount of a single file is bound into one: into a
view of the root file system or of the mount that it is in, or into a directory that holds nothing else. The pod's own
files, which nobody changes, cost no mount: they are copied into the root file system, or linked into such a directory.
All of it blocks: call it in a thread. Invariant: every mount made here is below `work`, so that `dismantle` needs to
know nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import shutil
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from cri_shim.kernel import fs, mounts
from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.handler import ContainerPlan, PodContext
from cri_shim.pb import api_pb2 as pb
from handlers.wasmtime.guest_spec import Preopen


@dataclass(frozen=True, slots=True)
class _Mount:
    source: Path
    readonly: bool
    host_backed: bool
    """Not of an image volume: what an image brings is everybody's."""
    options: tuple[str, ...] = ()
    """Of mount(8), which have been looked at."""


def arrange(plan: ContainerPlan, work: Path, *, may_mount: bool) -> tuple[Preopen, ...]:
    """Make what has to be made below `work` and say what to open. On error `dismantle(work)` undoes it."""
    directories: dict[str, _Mount] = {}
    files: dict[str, _Mount] = {}
    for mount in plan.config.mounts:
        target, source = _target(mount), Path(mount.host_path)
        found = _Mount(source, mount.readonly, not mount.HasField("image"), tuple(mount.mount_options))
        mode = _mode(found.source)
        if stat.S_ISDIR(mode):
            directories[target] = found
        elif stat.S_ISREG(mode):
            files[target] = found
        else:
            msg = f"mounts: host_path {mount.host_path} of {target} is neither a directory nor a file"
            raise InvalidArgument(msg, hint="a Wasm module cannot use sockets, FIFOs or devices")
    of_pod = _pod_files(plan.pod, (*directories, *files))
    inside = {file: directory for file in files if (directory := _around(file, directories))}
    preopens = []
    for number, (target, found) in enumerate(directories.items()):
        inner = {file: files.pop(file) for file, directory in inside.items() if directory == target}
        preopens.append(_preopen(target, found, inner, work / "views" / str(number), may_mount=may_mount))
    if plan.rootfs is not None:
        for target, source in of_pod.items():
            _copy_into(plan.rootfs, target, source)
        readonly = plan.config.linux.security_context.readonly_rootfs
        root = _view(plan.rootfs, work / "root", files, readonly=readonly) if files else plan.rootfs
        writable_file = any(not mount.readonly for mount in files.values())
        # The view's own mounts keep the rest of a read-only root file system so.
        host_backed = any(mount.host_backed for mount in files.values())
        preopens.append(Preopen(str(root), "/", readonly and not writable_file, host_backed, nodev=may_mount))
    else:
        preopens += _file_directories(work / "files", files, of_pod, may_mount=may_mount)
    return tuple(preopens)


def dismantle(work: Path) -> None:
    """Undo `arrange`, done in part or by an earlier daemon. Gone is success."""
    if not work.exists():
        return
    # Whole, before anything in it by its path: others can rename what is in a volume.
    for view in (work / "root", *(work / "views").glob("*")):
        mounts.unmount_all(view)
    try:
        fs.remove_tree(work)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        mounts.unmount_tree(work.resolve())  # reads the table of all mounts, which few containers need
        fs.remove_tree(work)


def _target(mount: pb.Mount) -> str:
    target = posixpath.normpath(mount.container_path)
    if target in {"/", "//"}:
        msg = f"mounts: container_path {mount.container_path!r} is not a path below /"
        raise InvalidArgument(msg)
    return target


def _mode(source: Path) -> int:
    """The type of a mount's source. A missing one becomes a directory, as with the other CRI runtimes."""
    try:
        return source.stat().st_mode
    except FileNotFoundError:
        source.mkdir(mode=0o755, parents=True, exist_ok=True)
        return source.stat().st_mode
    except OSError as error:
        msg = f"mounts: host_path {source}: {error.strerror}"
        raise FailedPrecondition(msg) from error


def _around(file: str, directories: Collection[str]) -> str:
    """The innermost mount that a file is to be in; empty for none."""
    return max((directory for directory in directories if file.startswith(f"{directory}/")), key=len, default="")


def _preopen(target: str, mount: _Mount, files: Mapping[str, _Mount], view: Path, *, may_mount: bool) -> Preopen:
    """A directory as it lies, or a view of it with its options, and the files bound into it."""
    if not files and not mount.options:
        return Preopen(str(mount.source), target, mount.readonly, mount.host_backed, nodev=may_mount)
    if not may_mount:
        what = "a file inside it" if files else "mount_options"
        msg = f"mounts: {what} of {target}: only a daemon with root can mount that"
        raise FailedPrecondition(msg)
    view.mkdir(parents=True)
    mounts.view(mount.source, view, readonly=mount.readonly, options=mount.options)
    for file, found in files.items():
        _bind_inside(view, target, file, found)
    writable_file = any(not file.readonly for file in files.values())
    host_backed = mount.host_backed or any(file.host_backed for file in files.values())
    return Preopen(str(view), target, mount.readonly and not writable_file, host_backed, nodev=may_mount)


def _bind_inside(view: Path, target: str, file: str, found: _Mount) -> None:
    """By a descriptor: others can change what is in a volume meanwhile."""
    try:
        handle = _file(view, file.removeprefix(target))
    except OSError as error:
        msg = f"mounts: {file} in the mount {target}: no file can be made there to mount it on: {error.strerror}"
        raise FailedPrecondition(msg) from error
    try:
        mounts.view(found.source, handle, readonly=found.readonly, options=found.options)
    finally:
        os.close(handle)


def _pod_files(pod: PodContext, taken: Collection[str]) -> dict[str, Path]:
    """By their places in the container; what a mount of the request is at or hides is left out."""
    places = {"/etc/hosts": pod.hosts, "/etc/hostname": pod.hostname_file, "/etc/resolv.conf": pod.resolv_conf}
    return {
        place: source for place, source in places.items() if not any(f"{place}/".startswith(f"{t}/") for t in taken)
    }


def _copy_into(rootfs: Path, target: str, source: Path) -> None:
    """In place of a file or a link of the image. A directory of that name stays: it is no place for a file."""
    with contextlib.suppress(IsADirectoryError, NotADirectoryError):
        parent = _directory(rootfs, posixpath.dirname(target))
        try:
            name = posixpath.basename(target)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
            handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent)
            with os.fdopen(handle, "wb") as copy:
                copy.write(source.read_bytes())
        finally:
            os.close(parent)


def _view(rootfs: Path, view: Path, files: Mapping[str, _Mount], *, readonly: bool) -> Path:
    """The root file system once more, with the files bound into it."""
    places = {_mount_point(rootfs, target): mount for target, mount in files.items()}
    view.mkdir(parents=True)
    mounts.bind(rootfs, view, readonly=readonly)
    for place, mount in places.items():
        mounts.view(mount.source, view / place, readonly=mount.readonly, options=mount.options)
    return view


def _mount_point(rootfs: Path, target: str) -> Path:
    """The file that `target` means inside `rootfs`, made when missing; relative to it, free of symlinks."""
    handle = _file(rootfs, target)
    try:
        return Path(f"/proc/thread-self/fd/{handle}").readlink().relative_to(rootfs.resolve())
    finally:
        os.close(handle)


def _file(root: Path, target: str) -> int:
    """A descriptor of the file that `target` means inside `root`, made when missing."""
    try:
        handle = fs.open_in_root(root, target, os.O_PATH)
    except FileNotFoundError:
        parent = _directory(root, posixpath.dirname(target))
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            handle = os.open(posixpath.basename(target), flags, 0o644, dir_fd=parent)
        finally:
            os.close(parent)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        msg = f"mounts: {target} is not a file where it is to be mounted, but what is mounted there is one"
        raise InvalidArgument(msg)
    return handle


def _directory(rootfs: Path, path: str) -> int:
    """A descriptor of a directory inside `rootfs`; missing ones are made."""
    flags = os.O_PATH | os.O_DIRECTORY
    try:
        return fs.open_in_root(rootfs, path, flags)
    except FileNotFoundError:
        parent = _directory(rootfs, posixpath.dirname(path))
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(posixpath.basename(path), 0o755, dir_fd=parent)
        finally:
            os.close(parent)
    return fs.open_in_root(rootfs, path, flags)


def _file_directories(
    base: Path, files: Mapping[str, _Mount], of_pod: Mapping[str, Path], *, may_mount: bool
) -> list[Preopen]:
    """Without a root file system: one directory per parent, that holds the files and can hold nothing else.

    They are `base` with a number: one level less to make and to remove.
    """
    preopens = []
    for number, parent in enumerate(sorted({posixpath.dirname(target) for target in (*files, *of_pod)})):
        place = base.with_name(f"{base.name}{number}")
        place.mkdir(parents=True)
        for target, source in of_pod.items():
            if posixpath.dirname(target) == parent:
                os.link(source, place / posixpath.basename(target))
        here = {posixpath.basename(t): mount for t, mount in files.items() if posixpath.dirname(t) == parent}
        if here and may_mount:
            _bind_files(place, here)
        else:
            _copy_files(place, here)
        readonly = all(mount.readonly for mount in here.values())
        host_backed = any(mount.host_backed for mount in here.values())
        preopens.append(Preopen(str(place), parent, readonly, host_backed))
    return preopens


def _bind_files(place: Path, files: Mapping[str, _Mount]) -> None:
    for name in files:
        (place / name).touch()
    mounts.bind(place, place, readonly=True)
    for name, mount in files.items():
        mounts.view(mount.source, place / name, readonly=mount.readonly, options=mount.options)


def _copy_files(place: Path, files: Mapping[str, _Mount]) -> None:
    for name, mount in files.items():
        if not mount.readonly:
            msg = f"mounts: {name}: mounting a single writable file needs root"
            raise FailedPrecondition(msg, hint="mount its directory, or mount it read-only")
        shutil.copyfile(mount.source, place / name)
