"""The VOLUMEs that an image declares: a directory of the container's own for each, with what the image has there.

Not image volumes (`cri_shim.adapters.image_volumes`), which are mounts that a request asks for. Everything blocks and
belongs into a thread. Invariant: they are below the container's writable directory, and go with it.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable
from pathlib import Path

from cri_shim.kernel import fs
from cri_shim.kernel.copy import copy_contents
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.ids import ContainerId
from cri_shim.model.layout import Layout
from cri_shim.model.user_namespace import UserNamespace
from cri_shim.spec.container_request import without_taken
from cri_shim.spec.paths import rooted


def make(
    layout: Layout,
    container_id: ContainerId,
    rootfs: Path | None,
    declared: Iterable[str],
    taken: Iterable[str],
    ids: UserNamespace | None,
) -> dict[str, Path]:
    """A directory for each declared path, with the content, owner and mode that it has in `rootfs`.

    One that is not there, and any of a Wasm artifact, is made for root, of `ids` where there are some.

    By its place in the container, free of symlinks: one of the image must not lead it onto a place that is `taken` by
    a mount of the request. FailedPrecondition for a path that is no directory.
    """
    places = dict.fromkeys(_place(rootfs, rooted(path)) for path in declared)
    made = {}
    for number, place in enumerate(without_taken(places, {_place(rootfs, rooted(path)) for path in taken})):
        directory = layout.writable(container_id) / "volumes" / str(number)
        directory.mkdir(mode=0o755, parents=True)
        if ids is not None:
            os.chown(directory, ids.uids.first, ids.gids.first)
        if rootfs is not None:
            _fill(rootfs, place, directory)
        made[place] = directory
    return made


def _place(rootfs: Path | None, path: str) -> str:
    """What `path` means inside `rootfs`; what is missing is taken as it is written."""
    place = path if rootfs is None else _resolved(rootfs, path)
    if "\0" in place or any("\ud800" <= letter <= "\udfff" for letter in place):
        msg = f"the image's VOLUMEs and the mounts: {place!r} cannot be written as a path"
        raise FailedPrecondition(msg)
    return place


def _resolved(rootfs: Path, path: str) -> str:
    try:
        handle, missing = _nearest(rootfs, path)
    except OSError as error:
        msg = f"the image's VOLUMEs and the mounts: {path}: {os.strerror(error.errno or 0)} in the image"
        raise FailedPrecondition(msg) from error
    try:
        found = Path(f"/proc/thread-self/fd/{handle}").readlink()
    finally:
        os.close(handle)
    return rooted(posixpath.join(found.relative_to(rootfs.resolve()), missing))


def _nearest(rootfs: Path, path: str) -> tuple[int, str]:
    """A descriptor of the longest part of `path` that is there, and the rest."""
    missing = ""
    while True:
        try:
            return fs.open_in_root(rootfs, path, os.O_PATH), missing
        except FileNotFoundError:
            path, name = posixpath.split(path)
            missing = posixpath.join(name, missing)


def _fill(rootfs: Path, place: str, directory: Path) -> None:
    source = rootfs / place.lstrip("/")
    try:
        mode = source.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        msg = f"the image's VOLUME {place} is no directory in the image"
        raise FailedPrecondition(msg)
    copy_contents(source, directory)
