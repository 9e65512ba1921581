"""Unpacked layers: directories `layers/<n>`, made by unpackers and used as overlayfs lower directories.

It does not know which layers are needed: `cri_shim.flows.image_gc` does. Invariant: a directory without `.tmp` is
complete; one that no record names is removed at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from cri_shim.adapters.full_disk import NO_SPACE, disk_errors, disk_full
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.zygote import TaskError, Zygote, ZygoteLostError
from cri_shim.kernel import fs
from cri_shim.model.errors import CriShimError, FailedPrecondition, Internal, PullError
from cri_shim.model.image import LayerRecord
from cri_shim.model.layout import Layout
from cri_shim.wire.oci_image import Layer

_SETTLE_SECONDS: Final = 1800.0
_ARCHIVE_ERRORS: Final = frozenset({"LayerFormatError", "StreamError", "TreeError"})
_PLAIN_ROOT: Final = (0o755, 0, 0)


class _Report(msgspec.Struct, frozen=True):
    """What the unpack task returns (`cri_shim.zygote.unpack`)."""

    diff_id: str
    fingerprint: str
    size: int
    inodes: int
    implied: tuple[str, ...]
    links: tuple[tuple[str, str, bool], ...]
    whiteouts: tuple[str, ...]
    root_given: bool
    root_opaque: bool


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A layer that is on disk and not yet visible."""

    layer: Layer
    what: str
    """Its name in errors."""
    number: int
    directory: Path
    report: _Report


class Layers:
    """The layer directory. `privileged`: without root nothing can be unpacked, since owners could not be kept.

    `workers` unpackers at once; more than there are downloads, or those that wait for a slow one keep out all others.
    """

    def __init__(self, layout: Layout, zygote: Zygote, *, privileged: bool, workers: int = 4) -> None:
        self._layout = layout
        self._zygote = zygote
        self._privileged = privileged
        self._numbers = itertools.count(1)
        self._workers = asyncio.Semaphore(workers)

    async def open(self, known: Iterable[LayerRecord]) -> frozenset[int]:
        """Remove what no record names and return the numbers that are there."""
        numbers = frozenset(record.number for record in known)
        found = await asyncio.to_thread(self._sweep, numbers)
        self._numbers = itertools.count(max(found | numbers, default=0) + 1)
        return found

    def path(self, record: LayerRecord) -> Path:
        """The lower directory."""
        return self._layout.layer(record.number)

    def require_root(self, what: str) -> None:
        """FailedPrecondition in a daemon without root; better before the download."""
        if not self._privileged:
            hint = "run the daemon as root, or use Wasm images"
            raise FailedPrecondition(f"{what}: a daemon without root cannot unpack Linux layers", hint=hint)

    async def unpack(self, blob: tuple[int, int], layer: Layer, what: str) -> Unpacked:
        """Apply the blob of a layer to a new directory. The blob is a file that may still be growing, and a pipe: a
        byte means that there is more of it, its end that there is all.

        Raises PullError that names the entry for what is wrong with the archive, ResourceExhausted for a full disk,
        FailedPrecondition without root. Leaves nothing then; a result is for `commit` or `discard`.
        """
        self.require_root(what)
        number = next(self._numbers)
        directory = self._layout.layers / f"{number}.tmp"
        try:
            async with self._workers:
                result = await self._run("unpack", {}, (directory,), what, given=blob)
            unpacked = Unpacked(layer, what, number, directory, msgspec.convert(result, _Report))
            if unpacked.report.diff_id != layer.diff_id:
                msg = f"{what}: expected content with diff ID {layer.diff_id}, it is {unpacked.report.diff_id}"
                raise PullError(msg)
        except BaseException:
            await to_the_end(self._remove(directory))
            raise
        return unpacked

    async def commit(self, unpacked: Unpacked, below: Sequence[LayerRecord]) -> LayerRecord:
        """Complete the layer from those below it, bottom first, and give the directory its final name.

        Errors as in `unpack`; the directory is still the caller's to discard then.
        """
        report = unpacked.report
        inherits_root = not report.root_given and bool(below) and not await self.has_plain_root(below[-1])
        implied = ("", *report.implied) if inherits_root else report.implied
        needs_parents = bool(implied or report.links or report.whiteouts or report.root_opaque)
        size, inodes, fingerprint = report.size, report.inodes, report.fingerprint
        if needs_parents:
            arguments = {
                "implied": implied if below else (),
                "links": report.links,
                "whiteouts": report.whiteouts,
                "root_opaque": report.root_opaque,
                "lowers": [str(record.number) for record in reversed(below)],
            }
            paths = (unpacked.directory, self._layout.layers)
            added = await self._run("settle", arguments, paths, unpacked.what, timeout=_SETTLE_SECONDS)
            size, inodes, fingerprint = size + added["size"], inodes + added["inodes"], added["fingerprint"]
        try:
            await to_the_end(asyncio.to_thread(unpacked.directory.rename, self._layout.layer(unpacked.number)))
        except asyncio.CancelledError:
            await to_the_end(self.remove(unpacked.number))
            raise
        return LayerRecord(
            key=unpacked.layer.chain_id if needs_parents else unpacked.layer.diff_id,
            diff_id=unpacked.layer.diff_id,
            number=unpacked.number,
            size=size,
            inodes=inodes,
            needs_parents=needs_parents,
            fingerprint=fingerprint,
            inherits_root=not report.root_given,
        )

    async def discard(self, unpacked: Unpacked) -> None:
        """Remove a layer that was not committed."""
        await self._remove(unpacked.directory)

    async def remove(self, number: int) -> None:
        """Remove a committed layer; gone is success.

        Complete it is no more from the first moment: its row may still be there, on a full disk, when the daemon dies.
        """
        going = self._layout.layers / f"{number}.tmp"
        with contextlib.suppress(FileNotFoundError):
            await to_the_end(asyncio.to_thread(self._layout.layer(number).rename, going))
        await self._remove(going)

    async def has_plain_root(self, record: LayerRecord) -> bool:
        """True when the root directory is as it is without an entry for it: 0755, root, no xattrs."""
        return await asyncio.to_thread(_has_plain_root, self.path(record))

    async def damage(self, record: LayerRecord) -> str:
        """Look at a layer: what is wrong with it, empty when nothing is.

        Found is all that changes a name, a size, a time or an attribute. Not read again is what is in the files.
        """
        path = self.path(record)
        if not await asyncio.to_thread(path.is_dir):
            return "is not there"
        try:
            async with self._workers:
                found = await self._run("fingerprint", {}, (path,), str(path))
        except (CriShimError, OSError) as error:
            return f"cannot be read: {error}"
        return "" if record.fingerprint in {"", found["fingerprint"]} else "is not as it was unpacked"

    async def strangers(self, known: Collection[int]) -> list[Path]:
        """Directories that are neither these layers nor being made."""
        names = {str(number) for number in known}
        return await asyncio.to_thread(
            lambda: [path for path in self._layout.layers.iterdir() if path.name not in names and path.suffix != ".tmp"]
        )

    async def _run(
        self,
        task: str,
        arguments: Mapping[str, Any],
        paths: Sequence[Path],
        what: str,
        *,
        given: Sequence[int] = (),
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """One unpacker over the paths, as descriptors in this order, then `given`; a `.tmp` directory is made."""
        name = f"cri_shim.zygote.{task}:{task}"
        with disk_errors(self._layout.root):
            fds = await _opened(paths)
        try:
            try:
                return await self._zygote.run(name, arguments, (*fds, *given), timeout=timeout)
            except ZygoteLostError:
                return await self._zygote.run(name, arguments, (*fds, *given), timeout=timeout)
        except TaskError as error:
            raise self._explained(error, what) from error
        except Internal as error:
            msg = f"{what}: {error.cause}"
            raise Internal(msg, hint=error.hint) from error
        finally:
            for fd in fds:
                os.close(fd)

    def _explained(self, error: TaskError, what: str) -> CriShimError:
        if error.errno in NO_SPACE:
            return disk_full(self._layout.root)
        if error.type in _ARCHIVE_ERRORS or error.errno is not None:
            return PullError(f"{what}: {error.text}")
        return error

    async def _remove(self, directory: Path) -> None:
        await asyncio.to_thread(fs.remove_tree, directory)

    def _sweep(self, known: frozenset[int]) -> frozenset[int]:
        self._layout.layers.mkdir(parents=True, exist_ok=True)
        fs.spread_children(self._layout.layers)
        found = set()
        for directory in self._layout.layers.iterdir():
            if directory.name.isdigit() and int(directory.name) in known:
                found.add(int(directory.name))
            else:
                fs.remove_tree(directory)
        return frozenset(found)


async def _opened(paths: Sequence[Path]) -> list[int]:
    """Who is cancelled meanwhile leaves no descriptor, and no directory that is made behind its back."""
    opening = asyncio.ensure_future(asyncio.to_thread(_open_all, paths))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await to_the_end(_closed(opening))
        raise


async def _closed(opening: asyncio.Future[list[int]]) -> None:
    with contextlib.suppress(OSError):
        for fd in await opening:
            os.close(fd)


def _open_all(paths: Sequence[Path]) -> list[int]:
    fds: list[int] = []
    try:
        for path in paths:
            if path.suffix == ".tmp":
                path.mkdir(mode=0o755, exist_ok=True)
                path.chmod(0o755)  # whatever the umask
            fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _has_plain_root(path: Path) -> bool:
    status = path.stat()
    plain = (status.st_mode & 0o7777, status.st_uid, status.st_gid) == _PLAIN_ROOT
    return plain and not [name for name in os.listxattr(path) if not name.startswith("trusted.overlay.")]
