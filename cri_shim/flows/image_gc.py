"""Which blobs and layers are needed, and the removal of the others, at once and at the start.

Not a periodic sweep: whoever stops using content asks for its removal; only what pulls that failed have left for the
next attempt grows old by itself. Invariant: content that an image record, a container, an unfinished pull or a holder
names is never removed; content that none of them names is gone when its last user has let go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from cri_shim.adapters.compiled_modules import CompiledModules
from cri_shim.adapters.content import Content
from cri_shim.adapters.layers import Layers
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Table
from cri_shim.log import get_logger
from cri_shim.model.errors import CriShimError
from cri_shim.model.ids import Digest, ImageId
from cri_shim.model.image import ImageRecord, LayerRecord, UnfinishedPull

log = get_logger()

UNFINISHED_SECONDS: Final = 24 * 3600
UNFINISHED_BYTES: Final = 8 << 30
"""What pulls that failed may leave for the next attempt, and for how long after their begin."""
_EXPIRY_SECONDS: Final = 600.0


@dataclass(slots=True)
class ImageCollector:
    """`layers_in_use` are the layers of containers, which may outlive the image's record."""

    images: Table[ImageId, ImageRecord]
    layer_records: Table[Digest, LayerRecord]
    content: Content
    layers: Layers
    modules: CompiledModules
    pulls: Table[Digest, UnfinishedPull]
    layers_in_use: Callable[[], set[Digest]]
    now: Callable[[], int]
    """Unix time, ns."""
    _held: Counter[Digest] = field(default_factory=Counter)
    _removal: asyncio.Lock = field(default_factory=asyncio.Lock)
    _expiry: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def hold(self, digests: Iterable[Digest]) -> AsyncGenerator[None]:
        """Keep blobs and layers (also ones that are yet to come) while the block runs.

        What nobody needs at its end is removed then. A removal that is under way is waited for, so that what is seen
        in the block is there to stay.
        """
        digests = tuple(digests)
        async with self._removal:
            self._held.update(digests)
        try:
            yield
        finally:
            self._held.subtract(digests)
            self._held = +self._held
            await to_the_end(self.drop_unused(digests))

    async def settle(self) -> None:
        """Wait for a removal that is under way: content that is there afterwards, and that a record names, stays."""
        async with self._removal:
            return

    async def drop_unused(self, digests: Iterable[Digest]) -> None:
        """Remove those of the given blobs, layers and compiled modules that nobody needs; absent is success."""
        digests = tuple(digests)
        async with self._removal:
            blobs, layers = self._needed()
            await self.content.delete([digest for digest in digests if digest not in blobs])
            unused = (digest for digest in digests if digest not in layers)
            records = [record for digest in unused if (record := self.layer_records.get(digest)) is not None]
            for record in records:
                await self.layer_records.forget(record.key)
        await self.modules.drop_unused(digests)
        # Out of the lock: without its record nobody can find the directory, and a large one takes seconds.
        for record in records:
            await self.layers.remove(record.number)

    async def repair(self) -> None:
        """At the start: make records and disk agree again, whatever moment the last daemon died at.

        Images whose content is not there any more lose their record (the kubelet pulls them again), and so do
        unfinished pulls of which nothing is there; content that nobody names is removed. What unfinished pulls name
        stays, for the next attempt.
        """
        await self.content.open()
        numbers = await self.layers.open(self.layer_records.values())
        for layer in self.layer_records.values():
            if layer.number not in numbers:
                await self.layer_records.forget(layer.key)
        for image in self.images.values():
            if not self._is_complete(image):
                await self.images.forget(image.key)
        for pull in self.pulls.values():
            if not self._size(pull):
                await self.pulls.forget(pull.key)
        await self.drop_unused((*self.content.digests(), *self.content.partials(), *self.layer_records.keys()))
        await self.expire()

    def start(self) -> None:
        """From now on give up by itself what has grown old."""
        self._expiry = asyncio.get_running_loop().create_task(self._expire_for_ever())

    async def aclose(self) -> None:
        """No more of that."""
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.wait((self._expiry,))

    async def _expire_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRY_SECONDS)
            try:
                await self.expire()
            except (CriShimError, OSError) as error:
                log.warning("cannot remove what unfinished pulls have left", error=str(error))

    async def expire(self) -> None:
        """Give up unfinished pulls that are too old, and the oldest of those that take too much room."""
        oldest = self.now() - UNFINISHED_SECONDS * 1_000_000_000
        taken = 0
        for pull in sorted(self.pulls.values(), key=lambda pull: pull.started_at, reverse=True):
            taken += self._size(pull)
            if pull.started_at < oldest or taken > UNFINISHED_BYTES:
                await self.give_up(pull)

    async def give_up(self, *pulls: UnfinishedPull) -> None:
        """Remove what only these pulls were to go on with. One that runs keeps what it holds."""
        for pull in pulls:
            await self.pulls.forget(pull.key)
            await self.drop_unused(_all_of(pull))

    def _needed(self) -> tuple[set[Digest], set[Digest]]:
        """Blobs and layers. A layer that was transferred as it is has one digest for both."""
        blobs, layers = set(self._held), set(self._held) | self.layers_in_use()
        for image in self.images.values():
            blobs.update(image.blobs)
            layers.update(image.layers)
        for pull in self.pulls.values():
            needs = self._needs(pull)
            blobs.update(needs[0])
            layers.update(record.key for record in needs[1])
        return blobs, layers

    def _needs(self, pull: UnfinishedPull) -> tuple[list[Digest], list[LayerRecord]]:
        """Of each layer the directory, or as long as there is none, the blob."""
        blobs, layers = list(pull.blobs), []
        for blob, diff_id, chain_id in pull.layers:
            known = self.layer_records.get(chain_id) or self.layer_records.get(diff_id)
            if known is None:
                blobs.append(blob)
            else:
                layers.append(known)
        return blobs, layers

    def _size(self, pull: UnfinishedPull) -> int:
        """Bytes on disk, shared ones too."""
        partials = self.content.partials()
        blobs, layers = self._needs(pull)
        return sum(self.content.size(digest) or partials.get(digest, 0) for digest in blobs) + sum(
            layer.size for layer in layers
        )

    def _is_complete(self, image: ImageRecord) -> bool:
        has_layers = all(self.layer_records.get(key) is not None for key in image.layers)
        has_blobs = all(self.content.has(digest) for digest in image.blobs)
        module_fits = image.wasm is None or self.content.size(image.wasm.digest) == image.wasm.size
        return has_layers and has_blobs and module_fits


def _all_of(pull: UnfinishedPull) -> Iterable[Digest]:
    yield from pull.blobs
    for layer in pull.layers:
        yield from layer
