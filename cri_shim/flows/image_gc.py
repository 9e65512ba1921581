"""Which blobs and layers are needed, and the removal of the others, at once and at the start.

Not a periodic sweep: whoever stops using content asks for its removal. Invariant: content that an image record, a
container or a holder names is never removed; content that none of them names is gone when its last user has let go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field

from cri_shim.adapters.content import Content
from cri_shim.adapters.layers import Layers
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Table
from cri_shim.model.ids import Digest, ImageId
from cri_shim.model.image import ImageRecord, LayerRecord


@dataclass(slots=True)
class ImageCollector:
    """`layers_in_use` are the layers of containers, which may outlive the image's record."""

    images: Table[ImageId, ImageRecord]
    layer_records: Table[Digest, LayerRecord]
    content: Content
    layers: Layers
    layers_in_use: Callable[[], set[Digest]]
    _held: Counter[Digest] = field(default_factory=Counter)
    _removal: asyncio.Lock = field(default_factory=asyncio.Lock)

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
        """Remove those of the given blobs and layers that nobody needs; absent is success."""
        async with self._removal:
            needed = self._needed()
            unused = [digest for digest in digests if digest not in needed]
            await self.content.delete(unused)
            records = [record for digest in unused if (record := self.layer_records.get(digest)) is not None]
            for record in records:
                await self.layer_records.delete(record.key)
        # Out of the lock: without its record nobody can find the directory, and a large one takes seconds.
        for record in records:
            await self.layers.remove(record.number)

    async def repair(self) -> None:
        """At the start: make records and disk agree again, whatever moment the last daemon died at.

        Images whose content is not there any more lose their record (the kubelet pulls them again); content that
        nobody names is removed.
        """
        await self.content.open()
        numbers = await self.layers.open(self.layer_records.values())
        for layer in self.layer_records.values():
            if layer.number not in numbers:
                await self.layer_records.delete(layer.key)
        for image in self.images.values():
            if not self._is_complete(image):
                await self.images.delete(image.key)
        await self.drop_unused((*self.content.digests(), *self.layer_records.keys()))

    def _needed(self) -> set[Digest]:
        needed = set(self._held) | self.layers_in_use()
        for image in self.images.values():
            needed.update(image.blobs, image.layers)
        return needed

    def _is_complete(self, image: ImageRecord) -> bool:
        has_layers = all(self.layer_records.get(key) is not None for key in image.layers)
        has_blobs = all(self.content.has(digest) for digest in image.blobs)
        module_fits = image.wasm is None or self.content.size(image.wasm.digest) == image.wasm.size
        return has_layers and has_blobs and module_fits
