"""The image directory as others read it: which images are there in full, and `index.json`, which says so.

With `images.keep_blobs` that is all of them; without, layers are dropped after unpacking, and what has none (Wasm
artifacts) remains. Invariant: whatever `index.json` lists is there, byte for byte, so that skopeo can copy it.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from cri_shim.adapters.content import Content
from cri_shim.adapters.store import Table
from cri_shim.kernel import fs
from cri_shim.log import get_logger
from cri_shim.model.errors import CriShimError, PullError
from cri_shim.model.ids import Digest, ImageId
from cri_shim.model.image import ImageRecord
from cri_shim.model.layout import Layout
from cri_shim.wire import image_archive as wire
from cri_shim.wire.oci_image import OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest, digest_of, parse_document

log = get_logger()


@dataclass(frozen=True, slots=True)
class Parts:
    """An image in its parts: the entry for an index, and what its manifest names."""

    kept: wire.Kept
    manifest: Manifest
    blobs: tuple[Descriptor, ...]
    """All of them, documents first, each once."""


@dataclass(slots=True)
class ImageLayout:
    """Writes after every change of the images; changes that come meanwhile are written together."""

    images: Table[ImageId, ImageRecord]
    content: Content
    layout: Layout
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _stale: bool = False
    _converted: set[Digest] = field(default_factory=set)
    """Manifests that were made for the index; no record names them."""

    async def parts(self, record: ImageRecord, names: Sequence[str]) -> Parts:
        """Read the documents of an image; `names` are the tags that it is to have in an index."""
        body = await self.content.read(record.manifest)
        manifest = parse_document(body, "")
        if not isinstance(manifest, Manifest):
            msg = f"the manifest {record.manifest} is none"
            raise PullError(msg)
        described = Descriptor(record.manifest, len(body), wire.media_type(body))
        documents = [described]
        if record.index is not None and self.content.has(record.index):
            index = await self.content.read(record.index)
            described = Descriptor(record.index, len(index), wire.media_type(index))
            documents.insert(0, described)
        layers = tuple(layer.id for layer in manifest.layers) if record.wasm is None else None
        kept = wire.Kept(described, tuple(names), manifest.config.id, layers)
        blobs = {blob.digest: blob for blob in (*documents, manifest.config, *manifest.layers)}
        return Parts(kept, manifest, tuple(blobs.values()))

    async def write(self) -> None:
        """Make `index.json` true. A failure is told in the log: nothing of ours depends on that file."""
        self._stale = True
        async with self._writing:
            if not self._stale:
                return
            self._stale = False
            try:
                complete = [parts for record in self.images.values() if (parts := await self._complete(record))]
                listed = [await self._listed(parts) for parts in complete]
                await asyncio.to_thread(
                    fs.atomic_write, self.layout.images / wire.INDEX_FILE, wire.layout_index(listed)
                )
                listed_now = {entry.descriptor.id for entry in listed}
                await self.content.delete(list(self._converted - listed_now))
                self._converted &= listed_now
            except (OSError, CriShimError) as error:
                self._stale = True
                log.warning("cannot write the index of the image directory", error=str(error))

    async def _listed(self, parts: Parts) -> wire.Kept:
        """The entry of an image. Docker's documents are nothing that other tools look for in a layout."""
        descriptor = next((blob for blob in parts.blobs[:2] if blob.media_type in {OCI_INDEX, OCI_MANIFEST}), None)
        if descriptor is None:
            body = wire.oci_manifest(parts.manifest)
            descriptor = Descriptor(digest_of(body), len(body), OCI_MANIFEST)
            await self.content.put(descriptor.id, body)
            self._converted.add(descriptor.id)
        return dataclasses.replace(parts.kept, descriptor=descriptor)

    async def _complete(self, record: ImageRecord) -> Parts | None:
        """None when not all of it stays: what a pull or a save has just now does not count, nor what is damaged."""
        try:
            parts = await self.parts(record, record.repo_tags)
        except (OSError, PullError):
            return None
        return parts if all(blob.id in record.blobs for blob in parts.blobs) else None
