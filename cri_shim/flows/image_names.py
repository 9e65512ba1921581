"""The names of images: tags, which move from one image to another, digests, which never do, and what users pinned.

Not content: what a record names is on disk before it comes here. Invariant: a tag belongs to one image at a time, or to
several platforms of one index, and a pin on a tag goes where the tag goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

import msgspec

from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Table
from cri_shim.flows.image_layout import ImageLayout
from cri_shim.model.ids import ImageId
from cri_shim.model.image import ImageRecord


@dataclass(slots=True)
class ImageNames:
    """Every change of names, one after the other: between two of its steps two images would have the same tag."""

    images: Table[ImageId, ImageRecord]
    layout: ImageLayout
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def commit(
        self,
        record: ImageRecord,
        *,
        tags: Collection[str] = (),
        digests: Collection[str] = (),
        pins: Collection[str] = (),
    ) -> None:
        """Make a complete image visible, under these names and those of a record that has the same content.

        `pins` are some of its tags, or its id.
        """
        async with self._changing:
            await to_the_end(self._commit(record, tags, digests, pins))
        await to_the_end(self.layout.write())

    async def add_digest(self, image_id: ImageId, name: str | None) -> bool:
        """Add `name@digest`, if there is one, to an image; False when it has just been removed."""

        def with_name(known: ImageRecord) -> ImageRecord:
            return msgspec.structs.replace(known, repo_digests=_with(known.repo_digests, name))

        return await self.images.update(image_id, with_name) is not None

    async def add_tag(self, image_id: ImageId, tag: str) -> bool:
        """Move a tag to an image; False when that has just been removed."""
        async with self._changing:
            added = await to_the_end(self._add_tag(image_id, tag))
        await to_the_end(self.layout.write())
        return added

    async def remove_tag(self, image_id: ImageId, tag: str) -> None:
        """Take a tag away, and the pin on it."""
        async with self._changing:
            await self.images.update(image_id, lambda record: _without_tag(record, tag))
        await to_the_end(self.layout.write())

    async def pin(self, image_id: ImageId, name: str) -> bool:
        """Pin an image by one of its tags or its id; False when it has just been removed."""

        def with_pin(record: ImageRecord) -> ImageRecord:
            return msgspec.structs.replace(record, pins=_with(record.pins, name))

        return await self.images.update(image_id, with_pin) is not None

    async def unpin(self, image_id: ImageId, names: Collection[str]) -> None:
        """Take pins away."""

        def without_pins(record: ImageRecord) -> ImageRecord:
            return msgspec.structs.replace(record, pins=tuple(name for name in record.pins if name not in names))

        await self.images.update(image_id, without_pins)

    async def _commit(
        self, record: ImageRecord, tags: Collection[str], digests: Collection[str], pins: Collection[str]
    ) -> None:
        known = self.images.get(record.id)
        if known is not None:
            record = msgspec.structs.replace(
                record,
                index=record.index or known.index,
                repo_tags=known.repo_tags,
                repo_digests=known.repo_digests,
                pins=known.pins,
                modules=known.modules,
                blobs=tuple(dict.fromkeys((*record.blobs, *known.blobs))),
            )
        for digest in digests:
            record = msgspec.structs.replace(record, repo_digests=_with(record.repo_digests, digest))
        for tag in tags:
            record = _with_tag(record, tag, pinned=tag in pins or self._is_pinned(tag))
        if record.id in pins:
            record = msgspec.structs.replace(record, pins=_with(record.pins, record.id))
        await self.images.put(record)
        for tag in tags:
            await self._take_tag(record.id, tag)

    async def _add_tag(self, image_id: ImageId, tag: str) -> bool:
        pinned = self._is_pinned(tag)
        if await self.images.update(image_id, lambda record: _with_tag(record, tag, pinned=pinned)) is None:
            return False
        await self._take_tag(image_id, tag)
        return True

    def _is_pinned(self, tag: str) -> bool:
        return any(tag in record.pins for record in self.images.values())

    async def _take_tag(self, owner: ImageId, tag: str) -> None:
        record = self.images.get(owner)
        for other in self.images.values():
            if tag in other.repo_tags and other.id != owner and not (record and record.is_sibling(other)):
                await self.images.update(other.id, lambda record: _without_tag(record, tag))


def _with(names: tuple[str, ...], name: str | None) -> tuple[str, ...]:
    return names if name is None or name in names else (*names, name)


def _with_tag(record: ImageRecord, tag: str, *, pinned: bool) -> ImageRecord:
    pins = _with(record.pins, tag) if pinned else record.pins
    return msgspec.structs.replace(record, repo_tags=_with(record.repo_tags, tag), pins=pins)


def _without_tag(record: ImageRecord, tag: str) -> ImageRecord:
    return msgspec.structs.replace(
        record,
        repo_tags=tuple(name for name in record.repo_tags if name != tag),
        pins=tuple(name for name in record.pins if name != tag),
    )
