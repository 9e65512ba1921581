"""Compiled modules: `root/wasm/<engine>/<digest>.cwasm`, each as long as an image or a container needs it.

Not a compiler: a handler has one, and names its engine. Invariant: a module is made once, whoever asks meanwhile; what
nobody needs is gone when its last user has let go, or at the next start of the daemon.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from cri_shim.adapters.full_disk import disk_errors
from cri_shim.adapters.store import Table
from cri_shim.kernel import fs
from cri_shim.model.ids import Digest, ImageId, digest_hex
from cri_shim.model.image import ImageRecord

_SUFFIX: Final = ".cwasm"
_OF_HANDLER: Final = "own"
"""The directory, beside the modules, for those of the handler itself. Nobody looks into it."""
_PER_IMAGE: Final = 16
"""Modules that an image keeps compiled, the latest ones; a container keeps its own besides."""


class CompiledModules:
    """The directory. Methods belong to the event loop unless they say otherwise."""

    def __init__(self, directory: Path, images: Table[ImageId, ImageRecord]) -> None:
        self._directory = directory
        self._images = images
        self._sizes: dict[Path, int] = {}
        self._users: dict[str, set[Digest]] = {}
        self._running: dict[Path, asyncio.Task[None]] = {}
        self._removal = asyncio.Lock()

    async def open(self) -> None:
        """Look which there are, and remove what nobody needs: whose containers live on has said by now what they use.

        What the directory takes is known from memory from then on; before, nothing is removed.
        """
        self._sizes = await asyncio.to_thread(self._scan)
        await self.collect()

    def usage(self) -> tuple[int, int]:
        """Bytes and number of files."""
        sizes = tuple(self._sizes.values())
        return sum(sizes), len(sizes)

    def size(self, digest: Digest) -> int:
        """Bytes of one module's files, 0 without any."""
        return sum(self._sizes[path] for path in self._files((digest,)))

    def path(self, engine: str, digest: Digest) -> Path:
        """Where the compiled module is or will be. From any thread."""
        return self._directory / engine / f"{digest_hex(digest)}{_SUFFIX}"

    def own(self, engine: str) -> Path:
        """For what a handler makes for itself; it goes with the engine. From any thread."""
        return self._directory / engine / _OF_HANDLER

    def make_directory(self, path: Path) -> None:
        """One of ours, and those above it, for nobody else. Blocks."""
        # One by one: parents made by mkdir(parents=True) take the umask's mode.
        for directory in (*reversed(path.parents), path):
            if directory.is_relative_to(self._directory):
                directory.mkdir(mode=0o700, exist_ok=True)

    async def use(self, user: str, digest: Digest, image: ImageId | None) -> None:
        """Keep a module until `release`, and beyond that while its image is here.

        A removal that is under way is waited for: what is seen afterwards is there to stay.
        """
        async with self._removal:
            self._users.setdefault(user, set()).add(digest)
        if image is not None:
            await self._images.update(image, lambda record: _with_module(record, digest))

    async def release(self, user: str) -> None:
        """Remove what only this user has needed; unknown is success."""
        await self.drop_unused(self._users.pop(user, ()))

    async def drop_unused(self, digests: Iterable[Digest]) -> None:
        """Remove those of the modules that nobody needs; absent is success."""
        async with self._removal:
            there = self._files(digests)
            needed = self._needed() if there else set()
            unused = [path for path in there if _digest(path) not in needed]
            for path in unused:
                del self._sizes[path]
            if unused:
                await asyncio.to_thread(_unlink, unused)

    async def collect(self) -> None:
        """Remove whatever nobody needs."""
        await self.drop_unused(_digest(path) for path in self._sizes)

    async def strangers(self) -> list[Path]:
        """Files that are not known to be there, or that nobody needs."""
        found = await asyncio.to_thread(lambda: [path for path in self._directory.glob("*/[!.]*") if path.is_file()])
        needed = self._needed()
        return [path for path in found if path not in self._sizes or _digest(path) not in needed]

    def keeps(self, target: Path) -> bool:
        """Whether a file that was there a moment ago has not been removed here since."""
        return target in self._sizes

    async def make(self, target: Path, compile_to: Callable[[Path], Awaitable[int]]) -> None:
        """Have the file at `target`: `compile_to` makes it, and says how many bytes it has.

        Everybody who asks meanwhile shares the one run, which goes on when all of them have left.
        """
        task = self._running.get(target)
        if task is None:
            task = asyncio.create_task(self._make(target, compile_to))
            self._running[target] = task
            task.add_done_callback(lambda done: self._forget(target, done))
        await asyncio.shield(task)

    async def _make(self, target: Path, compile_to: Callable[[Path], Awaitable[int]]) -> None:
        if await asyncio.to_thread(target.exists):
            return
        with disk_errors(self._directory):
            await asyncio.to_thread(self.make_directory, target.parent)
            size = await compile_to(target)
        if target.parent.name != _OF_HANDLER:
            self._sizes[target] = size

    def _forget(self, target: Path, done: asyncio.Task[None]) -> None:
        del self._running[target]
        if not done.cancelled():
            done.exception()  # whoever still waits gets it; nobody has to

    async def retire(self, engine: str, prefix: str) -> None:
        """Remove what was made for others of the engines whose names begin like this."""
        others = await asyncio.to_thread(
            lambda: [path for path in self._directory.glob(f"{prefix}*") if path.name != engine]
        )
        for directory in others:
            await asyncio.to_thread(fs.remove_tree, directory)
            self._sizes = {path: size for path, size in self._sizes.items() if path.parent != directory}

    async def aclose(self) -> None:
        """Make nothing more."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _needed(self) -> set[Digest]:
        of_images = (record.modules for record in self._images.values())
        return set(itertools.chain(*of_images, *self._users.values()))

    def _files(self, digests: Iterable[Digest]) -> list[Path]:
        names = {f"{digest_hex(digest)}{_SUFFIX}" for digest in digests}
        return [path for path in self._sizes if path.name in names]

    def _scan(self) -> dict[Path, int]:
        for scratch in self._directory.glob("*/.*"):
            scratch.unlink()
        return {path: path.stat().st_size for path in self._directory.glob(f"*/*{_SUFFIX}")}


def _with_module(record: ImageRecord, digest: Digest) -> ImageRecord:
    if digest in record.modules:
        return record
    return msgspec.structs.replace(record, modules=(*record.modules, digest)[-_PER_IMAGE:])


def _digest(path: Path) -> Digest:
    return Digest(f"sha256:{path.stem}")


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
