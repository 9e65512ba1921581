"""CheckImages of the admin service: is everything there that the records name, and as they say?

What the start of the daemon does not do, since it takes as long as reading every blob. Invariant: with `repair` nothing
damaged stays visible, except under a container that runs on it; an image that had it comes back under all its names, or
is told to be gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cri_shim.adapters.compiled_modules import CompiledModules
from cri_shim.adapters.content import Content
from cri_shim.adapters.layers import Layers
from cri_shim.adapters.store import Store
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.image_layout import ImageLayout
from cri_shim.flows.image_names import ImageNames
from cri_shim.flows.image_pull import PullImage, Wish
from cri_shim.kernel import fs
from cri_shim.model.errors import CriShimError
from cri_shim.model.ids import Digest
from cri_shim.model.image import ImageRecord, LayerRecord
from cri_shim.model.refs import parse_reference
from cri_shim.pb import admin_pb2 as pb

_SETTLE_SECONDS: Final = 1.0
"""A file that nobody names may be one that a pull is just about to name."""


@dataclass(slots=True)
class _Found:
    """What one check has come to."""

    blobs: set[Digest] = field(default_factory=set)
    layers: set[Digest] = field(default_factory=set)
    hashed: int = 0
    remaining: int = 0
    """Problems that are left."""


@dataclass(frozen=True, slots=True)
class CheckImages:
    """The RPC. One at a time, beside everything else that goes on."""

    store: Store
    content: Content
    layers: Layers
    modules: CompiledModules
    collector: ImageCollector
    layout: ImageLayout
    names: ImageNames
    pull: PullImage
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __call__(self, request: pb.CheckImagesRequest) -> AsyncGenerator[pb.CheckImagesResponse]:
        """Each problem as it is found, what was done about it, and a summary."""
        async with self._checking:
            async for answer in self._check(repair=request.repair):
                yield answer

    async def _check(self, *, repair: bool) -> AsyncGenerator[pb.CheckImagesResponse]:
        found = _Found()
        counts = len(self.content.digests()), len(self.store.layers.keys()), len(self.store.images.keys())
        async for problem in self._look(found):
            found.remaining += 1
            yield pb.CheckImagesResponse(problem=problem)
        strangers = await self._strangers()
        for path in strangers:
            found.remaining += 1
            yield pb.CheckImagesResponse(problem=f"{path} belongs to nothing")
        if repair:
            async for done in self._repair(found, strangers):
                yield done
        blobs, layers, images = counts
        yield pb.CheckImagesResponse(
            summary=pb.CheckSummary(
                blobs=blobs, layers=layers, images=images, bytes=found.hashed, problems=found.remaining
            )
        )

    async def _look(self, found: _Found) -> AsyncGenerator[str]:
        for digest in self.content.digests():
            size, damage = self.content.size(digest), await self.content.damage(digest)
            found.hashed += size or 0
            if damage and self.content.has(digest):  # else it was removed meanwhile, as it may be
                found.blobs.add(digest)
                yield f"blob {digest} {damage}"
        for layer in self.store.layers.values():
            damage = await self.layers.damage(layer)
            if damage and self.store.layers.get(layer.key) is not None:
                found.layers.add(layer.key)
                yield f"layer {layer.key} ({self.layers.path(layer)}) {damage}"
        for image in self.store.images.values():
            missing = [blob for blob in image.blobs if not self.content.has(blob)]
            missing += [key for key in image.layers if self.store.layers.get(key) is None]
            found.blobs.update(missing)
            for digest in missing:
                yield f"image {_name(image)} lacks {digest}"

    async def _strangers(self) -> list[Path]:
        first = set(await self._unknown())
        if first:
            await asyncio.sleep(_SETTLE_SECONDS)
            first &= set(await self._unknown())
        return sorted(first)

    async def _unknown(self) -> Iterable[Path]:
        numbers = {layer.number for layer in self.store.layers.values()}
        return [
            *await self.content.strangers(),
            *await self.layers.strangers(numbers),
            *await self.modules.strangers(),
        ]

    async def _repair(self, found: _Found, strangers: Iterable[Path]) -> AsyncGenerator[pb.CheckImagesResponse]:
        found.remaining = 0
        await self.modules.collect()
        for path in strangers:
            await asyncio.to_thread(fs.remove_tree, path)
            yield pb.CheckImagesResponse(repaired=f"{path} is removed")
        used = self.collector.layers_in_use()
        for key in found.layers & used:
            found.layers.remove(key)
            found.remaining += 1
            hint = "remove the containers that run on it, and check again"
            yield pb.CheckImagesResponse(problem=f"layer {key} is in use and stays; {hint}")
        damaged = found.blobs | found.layers
        images = [image for image in self.store.images.values() if damaged & {*image.blobs, *image.layers}]
        # What is right of these images stays for the pulls that follow.
        async with self.collector.hold(part for image in images for part in (*image.blobs, *image.layers)):
            await self._drop(found, images)
            for image in images:
                yield await self._again(image, found)
        await self.modules.collect()
        await self.layout.write()

    async def _drop(self, found: _Found, images: Iterable[ImageRecord]) -> None:
        for image in images:
            await self.store.images.delete(image.id)
        await self.content.delete(list(found.blobs))
        layers = [layer for key in found.layers if (layer := self.store.layers.get(key)) is not None]
        for layer in layers:
            await self._remove(layer)

    async def _remove(self, layer: LayerRecord) -> None:
        await self.store.layers.delete(layer.key)
        await self.layers.remove(layer.number)

    async def _again(self, image: ImageRecord, found: _Found) -> pb.CheckImagesResponse:
        """Fetch an image again by its digest, and give it its names."""
        source = next(iter(image.repo_digests), None)
        if source is None:
            found.remaining += 1
            return pb.CheckImagesResponse(
                problem=f"image {_name(image)} is gone: it came from no registry; load it again"
            )
        ref = parse_reference(source)

        async def keep(record: ImageRecord, digest: Digest) -> None:
            del digest
            await self.names.commit(record, tags=image.repo_tags, digests=image.repo_digests, pins=image.pins)

        try:
            origin = await self.pull.registry.repository(ref, None)
            await self.pull.take(origin, Wish(_name(image), image.wasm is not None or image.platform.is_wasm), keep)
        except (CriShimError, OSError) as error:
            found.remaining += 1
            return pb.CheckImagesResponse(problem=f"image {_name(image)} is gone: {error}; pull it again")
        return pb.CheckImagesResponse(repaired=f"image {_name(image)} was fetched again")


def _name(image: ImageRecord) -> str:
    return next(iter((*image.repo_tags, *image.repo_digests)), image.id)
