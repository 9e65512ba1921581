"""SaveImages of the admin service: images as an archive that docker, containerd, podman, skopeo and we can load.

An OCI image layout that has docker's `manifest.json` as well. Layers that were dropped after unpacking are fetched
again, by digest. Invariant: the archive begins only when all of it is here, so that what ends early was cut off on its
way and not by us.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cri_shim.adapters.content import Content
from cri_shim.adapters.registry import Registry
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Table
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.image_layers import LayerPuller, all_of
from cri_shim.flows.image_layout import ImageLayout, Parts
from cri_shim.model.errors import InvalidArgument, NotFound, PullError
from cri_shim.model.ids import ImageId
from cri_shim.model.image import ImageRecord
from cri_shim.model.refs import find_images, parse_reference, tag_of
from cri_shim.pb import admin_pb2 as pb
from cri_shim.wire import image_archive as wire
from cri_shim.wire.oci_image import Descriptor
from cri_shim.wire.registry import RegistryError

_CHUNK: Final = 1 << 18
_BLOCK: Final = 512
_RECORD: Final = 20 * _BLOCK


@dataclass(frozen=True, slots=True)
class SaveImages:
    """The RPC."""

    images: Table[ImageId, ImageRecord]
    content: Content
    registry: Registry
    collector: ImageCollector
    puller: LayerPuller
    layout: ImageLayout

    async def __call__(self, request: pb.SaveImagesRequest) -> AsyncGenerator[pb.SaveImagesResponse]:
        """The archive, in order. NotFound, InvalidArgument, PullError where a layer cannot be fetched again."""
        if not request.images:
            raise InvalidArgument("no image is named")
        chosen = self._chosen(request.images)
        async with self.collector.hold(digest for record, _ in chosen for digest in record.blobs):
            saved = [(record, await self.layout.parts(record, names)) for record, names in chosen]
            blobs = {blob.id: blob for _, parts in saved for blob in parts.blobs}
            async with self.collector.hold(blobs):
                await all_of(self._fetch(record, parts) for record, parts in saved)
                async for data in self._archive([parts.kept for _, parts in saved], blobs.values()):
                    yield pb.SaveImagesResponse(data=data)

    def _chosen(self, texts: Iterable[str]) -> list[tuple[ImageRecord, tuple[str, ...]]]:
        """Each image once, with the tags by which it was named; by id or digest it keeps all."""
        chosen: dict[ImageId, tuple[ImageRecord, tuple[str, ...]]] = {}
        for text in texts:
            found = find_images(self.images.values(), text)
            if not found:
                msg = f"image {text!r} is not on this node"
                raise NotFound(msg)
            tag = tag_of(text, found)
            for record in found:
                names = record.repo_tags if tag is None else (tag,)
                _, before = chosen.get(record.id, (record, ()))
                chosen[record.id] = (record, tuple(dict.fromkeys((*before, *names))))
        return list(chosen.values())

    async def _fetch(self, record: ImageRecord, parts: Parts) -> None:
        missing = [blob for blob in parts.blobs if not self.content.has(blob.id)]
        if not missing:
            return
        source = next(iter((*record.repo_digests, *record.repo_tags)), None)
        if source is None:
            msg = f"image {record.id} came without its registry's name, and its layers were not kept"
            raise PullError(msg, hint="set images.keep_blobs before it is loaded")
        ref = parse_reference(source)
        origin = await self.registry.repository(ref, None)
        try:
            await all_of(self.puller.fetch(origin, blob, f"layer {blob.digest} of {ref.name}") for blob in missing)
        except RegistryError as error:
            hint = "its layers were not kept (images.keep_blobs) and have to be fetched again"
            msg = f"cannot save {source}: {error.cause}"
            raise PullError(msg, hint=hint) from error

    async def _archive(self, kept: Sequence[wire.Kept], blobs: Iterable[Descriptor]) -> AsyncGenerator[bytes]:
        for name, data in (
            (wire.LAYOUT_FILE, wire.LAYOUT),
            (wire.INDEX_FILE, wire.layout_index(kept)),
            (wire.DOCKER_FILE, wire.docker_index(kept)),
        ):
            yield wire.member(name, data)
        for blob in blobs:
            yield wire.member_head(wire.blob_name(blob.id), blob.size)
            async for piece in _pieces(self.content.path(blob.id)):
                yield piece
            yield bytes(-blob.size % _BLOCK)
        yield bytes(_RECORD)


async def _pieces(path: Path) -> AsyncGenerator[bytes]:
    fd = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Also when cancelled: a thread must not read from what is closed.
        while piece := await to_the_end(asyncio.to_thread(os.read, fd, _CHUNK)):
            yield piece
    finally:
        os.close(fd)
