"""The task that gives an unpacked layer what it takes from the layers below it.

An archive may leave out directories that lower layers have, and may hardlink to their files. On a merged tree both
just work; a layer that was unpacked alone gets them here: a directory without an entry takes mode, owner, times and
xattrs of the nearest lower layer that shows it, the target of a link is copied up. Invariant: each lookup happens
inside the root of one layer and follows no symlink of it, so what is found is what overlayfs shows there.
"""

# Paths are strings here: pathlib would double the time of a layer of ten thousand files.
# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH208, PTH211

from __future__ import annotations

import errno
import os
import stat
from typing import Any, NamedTuple

from cri_shim.zygote.chroot import enter
from cri_shim.zygote.fingerprint import of_tree
from cri_shim.zygote.tree import (
    Link,
    TreeError,
    is_opaque,
    is_whiteout,
    make_opaque,
    prefixes,
    set_attributes,
    set_xattrs,
)

_MAX_SYMLINKS = 40
_PAGE = 4096
_COPY = 1 << 30


def settle(arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Complete the layer `fds[0]` from `lowers`, names in the directory `fds[1]`, nearest first.

    `implied`, `links`, `whiteouts` and `root_opaque` are what `unpack` returned, the root being the empty path. The
    result is the additional `size` and `inodes`, and the `fingerprint` of what has come out.
    """
    own, layers = fds
    lowers = [
        os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=layers) for name in arguments["lowers"]
    ]
    os.close(layers)
    enter(own)
    settler = _Settler(own, lowers)
    if arguments["root_opaque"]:
        settler.hide_root()
    for path in arguments["implied"]:
        settler.settle_directory(path)
    for path in arguments["whiteouts"]:
        settler.settle_whiteout(path)
    for path, *link in arguments["links"]:
        settler.settle_link(path, Link(*link))
    settler.finish()
    return {"size": settler.size, "inodes": settler.inodes, "fingerprint": of_tree()}


class _Found(NamedTuple):
    """What one layer has at a path."""

    layer: int
    status: os.stat_result


class _Settler:
    """Between calls, the layer's own directory is the root and the working directory of this process."""

    def __init__(self, own: int, lowers: list[int]) -> None:
        self.size = 0
        self.inodes = 0
        self._own = own
        self._lowers = lowers
        self._times: dict[str, int] = {}
        self._moved: list[tuple[str, str]] = []

    def hide_root(self) -> None:
        """Overlayfs always merges roots, so an opaque root is made of a mark per name."""
        for name in {name for lower in self._lowers for name in self._names(lower)}:
            if not os.path.lexists(name):
                os.mknod(name, stat.S_IFCHR, os.makedev(0, 0))
                self.inodes += 1
            elif stat.S_ISDIR(os.lstat(name).st_mode):
                make_opaque(name)

    def settle_directory(self, path: str) -> None:
        """Make a directory that has no entry what the lower layers show; through a symlink, its content moves."""
        path = self._current(path)
        if not path:
            self._inherit(path, _Found(self._lowers[0], self._status(self._lowers[0], "")))
            return
        found = self._find(path)
        if found is None:
            return
        if stat.S_ISDIR(found.status.st_mode):
            self._inherit(path, found)
        elif stat.S_ISLNK(found.status.st_mode):
            place = self._follow(path, found, 0)
            self._merge(path, place)
            self._moved.append((path, place))

    def settle_whiteout(self, path: str) -> None:
        """Remove a mark that hides nothing: in a directory that is not merged, overlayfs would list it."""
        path = self._current(path)
        if self._find(path) is None:
            os.unlink(path)

    def settle_link(self, path: str, link: Link) -> None:
        """Link to a file of a lower layer, which comes into this layer first, as overlayfs does on a write."""
        path, target = self._current(path), self._current(link.target)
        if not link.from_below and os.path.lexists(target):
            os.link(target, path, follow_symlinks=False)
            return
        found = self._find_below(target) if link.from_below else self._find(target)
        if found is None:
            msg = f"entry {path!r}: its hardlink target {target!r} is in no layer"
            raise TreeError(msg)
        if link.from_below:
            self._copy_up(target, found, path)
            return
        self._directory("", target.rpartition("/")[0], 0)
        self._copy_up(target, found, target)
        os.link(target, path, follow_symlinks=False)

    def finish(self) -> None:
        """Set the times of directories, which every new name in them has changed."""
        for path, mtime in self._times.items():
            os.utime(path or ".", ns=(mtime, mtime))

    def _find(self, path: str) -> _Found | None:
        """What the layers below show at `path`, unless a directory of this layer hides it."""
        parent = path.rpartition("/")[0]
        hidden = bool(parent) and self._look(self._own, parent)[1]
        return None if hidden else self._find_below(path)

    def _find_below(self, path: str) -> _Found | None:
        for lower in self._lowers:
            status, hidden = self._look(lower, path)
            if status is not None:
                return _Found(lower, status)
            if hidden:
                return None
        return None

    def _look(self, layer: int, path: str) -> tuple[os.stat_result | None, bool]:
        """What `layer` has at `path`, and whether it hides what is below."""
        self._enter(layer)
        try:
            hidden = False
            for prefix in prefixes(path):
                try:
                    status = os.lstat(prefix)
                except FileNotFoundError:
                    return None, hidden
                if is_whiteout(status):
                    return None, True
                if prefix == path:
                    return status, hidden or not stat.S_ISDIR(status.st_mode) or is_opaque(prefix)
                if not stat.S_ISDIR(status.st_mode):
                    return None, True
                hidden = hidden or is_opaque(prefix)
            return None, hidden
        finally:
            self._enter(self._own)

    def _follow(self, path: str, found: _Found, symlinks: int) -> str:
        if symlinks >= _MAX_SYMLINKS:
            raise OSError(errno.ELOOP, f"entry {path!r}: {os.strerror(errno.ELOOP)}")
        target = self._readlink(path, found)
        base = "" if target.startswith("/") else path.rpartition("/")[0]
        return self._directory(base, target, symlinks + 1)

    def _directory(self, base: str, path: str, symlinks: int) -> str:
        """Resolve `path` in the merged tree, bringing its directories into this layer. Returns where it leads."""
        place = base
        for part in path.split("/"):
            if part == "..":
                place = place.rpartition("/")[0]
            elif part not in {"", "."}:
                place = self._step(f"{place}/{part}" if place else part, symlinks)
        return place

    def _step(self, path: str, symlinks: int) -> str:
        found = _Found(self._own, os.lstat(path)) if os.path.lexists(path) else self._find(path)
        if found is not None and stat.S_ISLNK(found.status.st_mode):
            return self._follow(path, found, symlinks)
        if found is None or not stat.S_ISDIR(found.status.st_mode):
            msg = f"{path!r}, which a symlink of a lower layer leads to, is not a directory"
            raise TreeError(msg)
        if found.layer != self._own:
            os.mkdir(path)
            self._count(_PAGE)
            self._inherit(path, found)
        return path

    def _merge(self, source: str, place: str) -> None:
        """Move everything in `source` into `place`."""
        for name in os.listdir(source):
            old, new = f"{source}/{name}", f"{place}/{name}" if place else name
            if not os.path.lexists(new):
                os.rename(old, new)
            elif stat.S_ISDIR(os.lstat(old).st_mode) and stat.S_ISDIR(os.lstat(new).st_mode):
                self._merge(old, new)
            else:
                msg = f"{old!r} and {new!r} are the same place, by a symlink of a lower layer"
                raise TreeError(msg)
        os.rmdir(source)

    def _inherit(self, path: str, found: _Found) -> None:
        status = found.status
        set_attributes(
            path or ".", stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, self._xattrs(found, path)
        )
        self._times[path] = status.st_mtime_ns

    def _copy_up(self, source: str, found: _Found, path: str) -> None:
        """Copy `source` of a lower layer to `path` of this one, with all that belongs to it."""
        status = found.status
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            msg = f"a hardlink to the directory {source!r}"
            raise TreeError(msg)
        if kind == stat.S_IFREG:
            self._copy_file(source, found, path)
        elif kind == stat.S_IFLNK:
            os.symlink(self._readlink(source, found), path)
        else:
            os.mknod(path, status.st_mode, status.st_rdev)
        os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)
        if kind != stat.S_IFLNK:
            os.chmod(path, stat.S_IMODE(status.st_mode))
        set_xattrs(path, self._xattrs(found, source))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
        self._count(status.st_size if kind == stat.S_IFREG else 0)

    def _copy_file(self, source: str, found: _Found, path: str) -> None:
        self._enter(found.layer)
        original = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._enter(self._own)
        copy = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        while os.sendfile(copy, original, None, _COPY):
            pass
        os.close(copy)
        os.close(original)

    def _readlink(self, path: str, found: _Found) -> str:
        self._enter(found.layer)
        try:
            return os.readlink(path)
        finally:
            self._enter(self._own)

    def _xattrs(self, found: _Found, path: str) -> dict[str, bytes]:
        self._enter(found.layer)
        try:
            names = os.listxattr(path or ".", follow_symlinks=False)
            return {name: os.getxattr(path or ".", name, follow_symlinks=False) for name in names}
        finally:
            self._enter(self._own)

    def _status(self, layer: int, path: str) -> os.stat_result:
        self._enter(layer)
        try:
            return os.lstat(path or ".")
        finally:
            self._enter(self._own)

    def _names(self, layer: int) -> list[str]:
        self._enter(layer)
        try:
            return [name for name in os.listdir(".") if not is_whiteout(os.lstat(name))]
        finally:
            self._enter(self._own)

    def _current(self, path: str) -> str:
        for old, new in self._moved:
            if path == old or path.startswith(f"{old}/"):
                path = (new + path.removeprefix(old)).removeprefix("/")
        return path

    def _enter(self, layer: int) -> None:
        os.fchdir(layer)
        os.chroot(".")

    def _count(self, size: int) -> None:
        self.inodes += 1
        self.size += (size + _PAGE - 1) // _PAGE * _PAGE
