"""Root file systems of containers: layers and a writable directory under one overlay, and what is read from inside.

Not the unpacking of layers. Everything blocks and belongs into a thread. Invariant: what an image contains is hostile:
every path in it is resolved inside of its root, and only regular files are ever opened.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cri_shim.kernel import fs, mounts
from cri_shim.model.entry import EntryKind, EntryPoint, entry_kind, split_function
from cri_shim.model.handler import PodContext
from cri_shim.model.ids import ContainerId, PodId
from cri_shim.model.image import LayerRecord
from cri_shim.model.layout import Layout
from cri_shim.model.user_namespace import UserNamespace
from cri_shim.spec.users import UserDatabase, parse_user_database

_DATABASE_LIMIT: Final = 1 << 20
_MAGIC_BYTES: Final = 4
_EXECUTABLE: Final = 0o111


@dataclass(frozen=True, slots=True)
class RootfsFacts:
    """What dispatch and the process plan need to know of an image's files."""

    users: UserDatabase
    entry: EntryKind


def make_bundle(layout: Layout, container_id: ContainerId | PodId, ids: UserNamespace | None) -> None:
    """The container's directory, closed to everybody but root and, to pass through, root of the pod."""
    bundle = layout.bundle(container_id)
    bundle.mkdir(mode=0o700, parents=True)
    if ids is not None:
        os.chown(bundle, -1, ids.gids.first)
        bundle.chmod(0o710)


def prepare(
    layout: Layout,
    container_id: ContainerId,
    layers: Sequence[LayerRecord],
    pod: PodContext | None = None,
    mount_label: str = "",
) -> Path:
    """Mount the container's root file system: `layers` (bottom first, at least one) below an empty writable layer.

    In a pod with a user namespace the files of the layers have the pod's ids. Mounted already = success. On error the
    caller calls `remove`.
    """
    ids, namespace = (pod.ids, pod.user) if pod is not None else (None, None)
    target, writable = layout.rootfs(container_id), layout.writable(container_id)
    if mounts.is_mount_point(target):
        return target
    upper, work = writable / "upper", writable / "work"
    for directory in (target, upper, work):
        directory.mkdir(parents=True, exist_ok=True)
    writable.chmod(0o711)  # nobody on the host lists it, the container's users pass through it
    _copy_attributes(layout.layer(_owner_of_root(layers).number), upper, ids)
    lowers = [layout.layer(layer.number) for layer in reversed(layers)]
    if namespace is None:
        mounts.overlay(target, lowers, upper, work, label=mount_label)
    else:
        mounts.idmapped_overlay(
            target, lowers, upper, work, base=layout.layers, user_namespace=namespace, label=mount_label
        )
    return target


def remove(layout: Layout, container_id: ContainerId | PodId) -> None:
    """Unmount the root file system, remove the writable layer and the bundle. Gone = success."""
    mounts.unmount_all(layout.rootfs(container_id))
    fs.remove_tree(layout.writable(container_id))
    fs.remove_tree(layout.bundle(container_id))


def read_facts(rootfs: Path, entry: EntryPoint) -> RootfsFacts:
    """Read the user database and the kind of the entry point."""
    passwd = fs.read_in_root(rootfs, "/etc/passwd", _DATABASE_LIMIT)
    group = fs.read_in_root(rootfs, "/etc/group", _DATABASE_LIMIT)
    return RootfsFacts(parse_user_database(passwd or b"", group or b""), entrypoint_kind(rootfs, entry))


def kind_of_entry(layout: Layout, layers: Sequence[LayerRecord], entry: EntryPoint) -> EntryKind:
    """The same of an image that no container has been made from; `layers` bottom first."""
    if not layers:
        return EntryKind.MISSING
    lowers = [layout.layer(layer.number) for layer in reversed(layers)]
    return mounts.looking_at(lowers, layout.state, lambda root: entrypoint_kind(root, entry))


def open_module(layout: Layout, layers: Sequence[LayerRecord], entry: EntryPoint) -> int | None:
    """The Wasm file that would be run in a container of an image, opened for reading; None without one.

    For an empty word it is the one file of the working directory whose name ends with `.wasm`.
    """
    lowers = [layout.layer(layer.number) for layer in reversed(layers)]
    return mounts.looking_at(lowers, layout.state, lambda root: _open_module(root, entry))


def entrypoint_kind(rootfs: Path, entry: EntryPoint) -> EntryKind:
    """What execvp(3) would find inside: a word with a slash is a path, any other is looked up on the PATH.

    Where it finds nothing, it may be a Wasm file: that is looked for in the working directory too, and its word may be
    `path#function`.
    """
    kind = _kind(rootfs, _candidates(entry))
    if kind is not EntryKind.MISSING:
        return kind
    module = replace(entry, word=split_function(entry.word)[0])
    places = (*_candidates(module), posixpath.join("/", entry.cwd, module.word))
    return EntryKind.WASM if _kind(rootfs, places) is EntryKind.WASM else EntryKind.MISSING


def _kind(rootfs: Path, places: Iterable[str]) -> EntryKind:
    for place in places:
        head = _first_bytes(rootfs, place)
        if head is not None:
            return entry_kind(head, place)
    return EntryKind.MISSING


def _open_module(rootfs: Path, entry: EntryPoint) -> int | None:
    module = replace(entry, word=split_function(entry.word)[0] or _only_module(rootfs, entry.cwd))
    for candidate in (*_candidates(entry), *_candidates(module)):
        head = _first_bytes(rootfs, candidate)
        if head is not None:
            is_module = entry_kind(head, candidate) is EntryKind.WASM
            return fs.open_in_root(rootfs, candidate, os.O_RDONLY) if is_module else None
    return None


def _only_module(rootfs: Path, directory: str) -> str:
    """The path of the one Wasm file in a directory; empty without one, or with several."""
    try:
        handle = fs.open_in_root(rootfs, directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return ""
    try:
        with os.scandir(handle) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(".wasm")]
    finally:
        os.close(handle)
    return posixpath.join(directory, names[0]) if len(names) == 1 else ""


def _owner_of_root(layers: Sequence[LayerRecord]) -> LayerRecord:
    """The topmost layer that says something about `/`: an overlay's root looks like its upper directory."""
    return next((layer for layer in reversed(layers) if not layer.inherits_root), layers[-1])


def _copy_attributes(source: Path, target: Path, ids: UserNamespace | None) -> None:
    status = source.stat()
    uid, gid = status.st_uid, status.st_gid
    if ids is not None:
        uid, gid = ids.uids.on_host(uid), ids.gids.on_host(gid)
    os.chown(target, uid, gid)
    target.chmod(stat.S_IMODE(status.st_mode))


def _candidates(entry: EntryPoint) -> Iterator[str]:
    if "/" in entry.word:
        yield posixpath.join("/", entry.cwd, entry.word)
        return
    for directory in entry.search.split(":"):
        yield posixpath.join("/", entry.cwd, directory, entry.word)


def _first_bytes(rootfs: Path, path: str) -> bytes | None:
    """The head of a regular file that could be executed; None when there is none. A Wasm file needs no x bit."""
    try:
        handle = fs.open_in_root(rootfs, path, os.O_PATH)
    except OSError:  # missing, a loop of links, a name that is too long: execve fails in the same way
        return None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return None
        with contextlib.suppress(OSError), open(f"/proc/thread-self/fd/{handle}", "rb") as file:  # noqa: PTH123
            head = file.read(_MAGIC_BYTES)
            executable = bool(status.st_mode & _EXECUTABLE)
            return head if executable or entry_kind(head, path) is EntryKind.WASM else None
    finally:
        os.close(handle)
    return None
