"""tar, as `kubectl cp` calls it: `tar cf - PATH…` and `tar -xmf - -C DIRECTORY`. Archives are streams, and plain.

Invariant: what is extracted lies in the directory given, in a preopen that may be written, and belongs to the user.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from collections.abc import Sequence
from typing import Final

from handlers.wasmtime.applets.options import UsageError, options
from handlers.wasmtime.applets.program import Container
from handlers.wasmtime.applets.view import Status

_FAILED: Final = 2
"""As of GNU tar, also where it goes on."""
_MODES: Final = 0o777
_SECOND: Final = 1_000_000_000
_BLOCK: Final = 1 << 16
_IGNORED: Final = ("no-same-owner", "no-same-permissions")
"""What is so in any case."""


def run_tar(container: Container, words: Sequence[str]) -> int:
    """Create (c) or extract (x) the archive that is `-` (f), in a directory (C); v and m mean nothing."""
    if words and not words[0].startswith("-"):
        words = [f"-{words[0]}", *words[1:]]
    found, names = options(words, "cxmvf:C:", _IGNORED)
    if found.get("-f") != "-" or ("-c" in found) is ("-x" in found):
        msg = "takes one of -c and -x, and -f -: the archive is a standard stream"
        raise UsageError(msg)
    directory = found.get("-C", ".")
    if "-x" in found:
        return _Extraction(container, directory).run()
    if not names:
        msg = "cowardly refusing to create an empty archive"
        raise UsageError(msg)
    return _Creation(container, directory).run(names)


class _Creation:
    def __init__(self, container: Container, directory: str) -> None:
        self._container = container
        self._view = container.view
        self._directory = directory
        self._status = 0

    def run(self, names: Sequence[str]) -> int:
        with os.fdopen(1, "wb", closefd=False) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
            for name in names:
                self._add(archive, name)
        return self._status

    def _add(self, archive: tarfile.TarFile, top: str) -> None:
        pending = [top]
        while pending:
            name = pending.pop()
            path = posixpath.join(self._directory, name)
            try:
                found = self._view.status(path, follow=False)
                if stat.S_ISDIR(found.mode):
                    archive.addfile(self._member(name, found, tarfile.DIRTYPE))
                    pending.extend(posixpath.join(name, inner) for inner in reversed(self._view.names(path)))
                elif stat.S_ISLNK(found.mode):
                    member = self._member(name, found, tarfile.SYMTYPE)
                    member.linkname = self._view.link(path)
                    archive.addfile(member)
                elif stat.S_ISREG(found.mode):
                    self._add_file(archive, name, path)
                else:
                    self._container.complain(f"{name}: not a file, a directory or a link; ignored")
            except BrokenPipeError:
                raise
            except OSError as error:
                self._container.failed(name, error)
                self._status = _FAILED

    def _add_file(self, archive: tarfile.TarFile, name: str, path: str) -> None:
        with self._view.opened(path, os.O_RDONLY) as descriptor:
            member = self._member(name, self._view.status(path, follow=False), tarfile.REGTYPE)
            member.size = os.fstat(descriptor).st_size
            archive.addfile(member, _Exactly(descriptor))

    @staticmethod
    def _member(name: str, found: Status, kind: bytes) -> tarfile.TarInfo:
        member = tarfile.TarInfo(name.lstrip("/") or ".")
        member.type, member.mode = kind, found.mode & _MODES
        member.uid, member.gid, member.mtime = found.uid, found.gid, found.modified_ns // _SECOND
        return member


class _Exactly:
    """A file that may shrink while it is read: what is missing is zeros, or the archive would be broken."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, size: int = _BLOCK, /) -> bytes:
        """What there is, and at least a byte."""
        return os.read(self._descriptor, size) or bytes(size)


class _Extraction:
    def __init__(self, container: Container, directory: str) -> None:
        self._container = container
        self._view = container.view
        self._directory = directory
        self._status = 0

    def run(self) -> int:
        try:
            with os.fdopen(0, "rb", closefd=False) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    self._extract(archive, member)
        except tarfile.TarError as error:
            self._fail(f"this does not look like a tar archive: {error}")
        return self._status

    def _fail(self, text: str) -> None:
        self._container.complain(text)
        self._status = _FAILED

    def _extract(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if ".." in member.name.split("/"):
            self._fail(f"{member.name}: member name contains '..'")
            return
        path = posixpath.join(self._directory, member.name.lstrip("/"))
        try:
            if member.isdir():
                self._view.make_directory(path, member.mode & _MODES)
            elif member.issym():
                self._view.make_link(path, member.linkname)
            elif member.isreg():
                self._copy(archive, member, path)
            else:
                self._fail(f"{member.name}: neither a file nor a directory nor a symbolic link")
        except OSError as error:
            self._fail(f"{member.name}: cannot open: {error.strerror}")

    def _copy(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        source = archive.extractfile(member)
        with self._view.created(path, member.mode & _MODES) as descriptor:
            while source is not None and (data := source.read(_BLOCK)):
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
