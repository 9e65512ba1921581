"""The directory of one layer, seen from inside: this process is chrooted into it, so no path can lead elsewhere.

It knows nothing of lower layers. What an archive leaves to them (directories without an entry of their own, hardlinks
to files that are not here) is recorded in `implied` and `links`. Invariant: every path that is passed to the kernel is
relative, and each of its components but the last is a real directory of this layer, never a symlink.

Overlay format: a character device 0:0 hides a name, `trusted.overlay.opaque=y` hides what lower layers have in a
directory (kernel, Documentation/filesystems/overlayfs.rst).
"""

# Paths are strings here: pathlib would double the time of a layer of ten thousand files.
# ruff: noqa: PTH101, PTH102, PTH106, PTH108, PTH114, PTH115, PTH116, PTH211

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from cri_shim.wire.layer_tar import Entry, Kind, Whiteout, contained_path, is_aufs_mark, parse_whiteout
from cri_shim.zygote.stream import LayerStream

T = TypeVar("T")

_OPAQUE = "trusted.overlay.opaque"
_CAPABILITY = "security.capability"
_OVERLAY_XATTRS = ("trusted.overlay.", "user.overlay.")
_MAX_SYMLINKS = 40  # as the kernel
_PAGE = 4096
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class TreeError(ValueError):
    """The archive asks for something that a file system cannot hold; the text says what."""


class Link(NamedTuple):
    """A hardlink to be made when the lower layers are known."""

    target: str
    from_below: bool = False
    """The target in the lower layers is meant, although this layer has something of that name."""


class Tree:
    """Call `add` for each entry in order, then `finish`."""

    def __init__(self) -> None:
        self.implied: dict[str, None] = {}
        """Directories that entries need and that have no entry, parents first."""
        self.links: dict[str, Link] = {}
        """Hardlinks whose target is not in this layer, by path."""
        self.whiteouts: dict[str, None] = {}
        """Marks of names that lower layers should have."""
        self.root_given = False
        self.root_opaque = False
        self.size = 0
        self.inodes = 0
        self._times: dict[str, int] = {}
        # New files get the mode that they are made with, and our own owner: no directory says otherwise, by its setgid
        # bit or a default ACL.
        self._as_asked = not (os.stat(".").st_mode & stat.S_ISGID or os.listxattr("."))
        # Names in `links` by their target, and by the directories above it.
        self._awaited: dict[str, list[str]] = {}
        self._awaited_below: dict[str, list[str]] = {}
        self._directories: set[str] = {""}
        self._parents: dict[str, str] = {"": ""}
        self._makers: dict[Kind, Callable[[str, Entry, LayerStream], None]] = {
            Kind.FILE: self._make_file,
            Kind.DIRECTORY: self._make_directory,
            Kind.SYMLINK: self._make_symlink,
            Kind.HARDLINK: self._make_hardlink,
            Kind.FIFO: self._make_node,
            Kind.CHAR_DEVICE: self._make_node,
            Kind.BLOCK_DEVICE: self._make_node,
        }

    def add(self, entry: Entry, stream: LayerStream) -> None:
        """Make what the entry says; takes a file's data, but not its padding, out of the stream."""
        path = contained_path(entry.name)
        if not path:
            self._set_root(entry)
            return
        if ".wh." in path and self._is_mark(path):
            stream.skip(entry.size)
            return
        directory, _, name = path.rpartition("/")
        place = _join(self._parent(directory), name)
        if self._awaited:
            self.links.pop(place, None)
            self._keep_links_to(place, below=entry.kind is not Kind.DIRECTORY)
        self._makers[entry.kind](place, entry, stream)

    def finish(self) -> None:
        """Set the times of directories, which every new name in them has changed."""
        for path, mtime in self._times.items():
            os.utime(path or ".", ns=(mtime, mtime))

    def _is_mark(self, path: str) -> bool:
        """Not a file of its own, but a word about others."""
        if is_aufs_mark(path):
            return True
        whiteout = parse_whiteout(path)
        if whiteout is None:
            return False
        self._hide(whiteout)
        return True

    def _set_root(self, entry: Entry) -> None:
        if entry.kind is not Kind.DIRECTORY:
            raise TreeError("the root of the layer is not a directory")
        self.root_given = True
        self._set_directory_attributes(".", entry)
        self._times[""] = entry.mtime

    def _make_file(self, path: str, entry: Entry, stream: LayerStream) -> None:
        mode = entry.mode & 0o777 if self._as_asked else 0o600
        fd: int = self._replacing(path, lambda: os.open(path, _NEW_FILE, mode))
        try:
            written = _copy(fd, entry, stream)
            if not self._as_asked or entry.uid or entry.gid or entry.mode != mode or entry.xattrs:
                set_attributes(fd, entry.mode, entry.uid, entry.gid, entry.xattrs)
            os.utime(fd, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(fd)
        self._count(written)

    def _make_directory(self, path: str, entry: Entry, _: LayerStream) -> None:
        if path not in self._directories:
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                self._make_over(path)
            self._directories.add(path)
            self._count(_PAGE)
        self.implied.pop(path, None)
        self._set_directory_attributes(path, entry)
        self._times[path] = entry.mtime

    def _set_directory_attributes(self, path: str, entry: Entry) -> None:
        set_attributes(path, entry.mode, entry.uid, entry.gid, entry.xattrs)
        if entry.mode & stat.S_ISGID or entry.xattrs:
            self._as_asked = False

    def _make_symlink(self, path: str, entry: Entry, _: LayerStream) -> None:
        self._replacing(path, lambda: os.symlink(entry.link, path))
        self._set_link_attributes(path, entry)

    def _make_node(self, path: str, entry: Entry, _: LayerStream) -> None:
        kind = {Kind.FIFO: stat.S_IFIFO, Kind.CHAR_DEVICE: stat.S_IFCHR, Kind.BLOCK_DEVICE: stat.S_IFBLK}[entry.kind]
        device = os.makedev(*entry.device)
        self._replacing(path, lambda: os.mknod(path, kind | 0o600, device))
        os.chmod(path, entry.mode)
        self._set_link_attributes(path, entry)

    def _make_hardlink(self, path: str, entry: Entry, stream: LayerStream) -> None:
        del stream
        target = contained_path(entry.link)
        if not target:
            raise TreeError("a hardlink to the root")
        directory, _, name = target.rpartition("/")
        found = self._walk("", directory, make=False)
        source = None if found is None else _join(found, name)
        if source == path:
            return
        pending = self.links.get(source) if source is not None else None
        if source is None or pending is not None or not os.path.lexists(source):
            if os.path.lexists(path):
                self._remove(path)
            self._await_target(path, pending or Link(source or target))
            return
        if is_whiteout(os.lstat(source)):
            msg = f"a hardlink to {target!r}, which the layer removes"
            raise TreeError(msg)
        self._replacing(path, lambda: os.link(source, path, follow_symlinks=False))

    def _hide(self, whiteout: Whiteout) -> None:
        directory = self._parent(whiteout.directory)
        if not whiteout.name:
            self.root_opaque = self.root_opaque or not directory
            make_opaque(directory)
            return
        path = _join(directory, whiteout.name)
        self._keep_links_to(path, below=True)
        try:
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        except FileExistsError:
            # A whiteout is about lower layers only: what this layer has there stays.
            if stat.S_ISDIR(os.lstat(path).st_mode):
                self._begin_anew(path)
            return
        self.whiteouts[path] = None

    def _await_target(self, path: str, link: Link) -> None:
        self.links[path] = link
        *above, _ = prefixes(link.target)
        self._awaited.setdefault(link.target, []).append(path)
        for directory in above:
            self._awaited_below.setdefault(directory, []).append(path)

    def _keep_links_to(self, path: str, *, below: bool) -> None:
        """Something takes the place of `path`: what was linked so far is the lower layers' file, there and below."""
        names = self._awaited.pop(path, [])
        if below:
            names += self._awaited_below.pop(path, [])
        for name in names:
            link = self.links.get(name)
            if link is not None and f"{link.target}/".startswith(f"{path}/"):
                self.links[name] = Link(link.target, from_below=True)

    def _parent(self, directory: str) -> str:
        """Where the entries of an archive's directory go, made where it is missing."""
        place = self._parents.get(directory)
        if place is None:
            place = self._walk("", directory, make=True)
            if place is None:
                raise AssertionError(directory)
            self._parents[directory] = place
        return place

    def _walk(self, base: str, path: str, *, make: bool, symlinks: int = 0) -> str | None:
        """Resolve `path` from `base` as the kernel does in a chroot. None: it is not there and was not to be made."""
        place = "" if path.startswith("/") else base
        for part in path.split("/"):
            if part == "..":
                place = place.rpartition("/")[0]
            elif part not in {"", "."}:
                step = self._step(_join(place, part), make=make, symlinks=symlinks)
                if step is None:
                    return None
                place = step
        return place

    def _step(self, path: str, *, make: bool, symlinks: int) -> str | None:
        if path in self._directories:
            return path
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return self._imply(path) if make else None
        if stat.S_ISDIR(status.st_mode):
            self._directories.add(path)
            return path
        if stat.S_ISLNK(status.st_mode):
            if symlinks >= _MAX_SYMLINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            base = path.rpartition("/")[0]
            return self._walk(base, os.readlink(path), make=make, symlinks=symlinks + 1)
        if not make:
            return None
        if is_whiteout(status):
            os.unlink(path)
            del self.whiteouts[path]
            self._imply(path)
            self._begin_anew(path)
            return path
        msg = f"{path!r} is not a directory"
        raise TreeError(msg)

    def _imply(self, path: str) -> str:
        os.mkdir(path, 0o755)
        self._directories.add(path)
        self.implied[path] = None
        self._times[path] = 0
        self._count(_PAGE)
        return path

    def _begin_anew(self, path: str) -> None:
        """A directory in the place of one that the layer removes: nothing of that one is left, not even its mode."""
        self.implied.pop(path, None)
        make_opaque(path)

    def _make_over(self, path: str) -> None:
        """Make a directory where something is: a directory stays, a whiteout makes it opaque, all else is replaced."""
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            return
        os.unlink(path)
        self._forget(path)
        os.mkdir(path, 0o700)
        if is_whiteout(status):
            make_opaque(path)

    def _replacing(self, path: str, make: Callable[[], T]) -> T:
        try:
            return make()
        except FileExistsError:
            self._remove(path)
            return make()

    def _remove(self, path: str) -> None:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            for directory, names, files in os.walk(path, topdown=False):
                for name in files:
                    os.unlink(_join(directory, name))
                for name in names:
                    child = _join(directory, name)
                    remove = os.unlink if os.path.islink(child) else os.rmdir
                    remove(child)
            os.rmdir(path)
        else:
            os.unlink(path)
        self._forget(path)

    def _forget(self, path: str) -> None:
        """Something was removed or replaced: nothing that was resolved through it holds any more."""
        below = f"{path}/"
        self._parents = {"": ""}
        self._directories = {""}
        for recorded in (self.implied, self.links, self.whiteouts, self._times):
            for known in [known for known in recorded if known == path or known.startswith(below)]:
                del recorded[known]

    def _set_link_attributes(self, path: str, entry: Entry) -> None:
        os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
        set_xattrs(path, entry.xattrs)
        os.utime(path, ns=(entry.mtime, entry.mtime), follow_symlinks=False)
        self._count(0)

    def _count(self, size: int) -> None:
        self.inodes += 1
        self.size += (size + _PAGE - 1) // _PAGE * _PAGE


def _copy(fd: int, entry: Entry, stream: LayerStream) -> int:
    """The data of a file; how many bytes of it take room."""
    if entry.sparse is None:
        return stream.copy_to(fd, entry.size)
    written = 0
    for offset, length in entry.sparse.pieces:
        os.lseek(fd, offset, os.SEEK_SET)
        written += stream.copy_to(fd, length)
    os.ftruncate(fd, entry.sparse.size)
    return written


def prefixes(path: str) -> Iterator[str]:
    """`a`, `a/b`, `a/b/c`."""
    end = path.find("/")
    while end != -1:
        yield path[:end]
        end = path.find("/", end + 1)
    yield path


def is_whiteout(status: os.stat_result) -> bool:
    """True for overlayfs' mark of a removed name."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(path: str) -> bool:
    """True for a directory that hides what lower layers have in it; the root of a layer is the empty path."""
    try:
        return os.getxattr(path or ".", _OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False


def make_opaque(path: str) -> None:
    """Hide what lower layers have in the directory."""
    os.setxattr(path or ".", _OPAQUE, b"y")


def set_attributes(file: str | int, mode: int, uid: int, gid: int, xattrs: Mapping[str, bytes]) -> None:
    """Owner first: a change of owner clears setuid bits and file capabilities. For anything but a symlink."""
    os.chown(file, uid, gid)
    os.chmod(file, mode)
    set_xattrs(file, xattrs)


def set_xattrs(file: str | int, xattrs: Mapping[str, bytes]) -> None:
    """Set all that a container can see.

    An archive has no say about overlayfs' own marks. What the file system cannot hold is left out, but for file
    capabilities, without which a program does not do its work.
    """
    for name, value in xattrs.items():
        if name.startswith(_OVERLAY_XATTRS):
            continue
        try:
            os.setxattr(file, name, value, follow_symlinks=isinstance(file, int))
        except OSError as error:
            if error.errno != errno.ENOTSUP or name == _CAPABILITY:
                raise


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name
