"""What images take on the disk, and what of it they share: sums over records, nothing is looked at.

Invariant: what one image takes alone is what its removal gives back, unless a container still needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from cri_shim.adapters.compiled_modules import CompiledModules
from cri_shim.adapters.content import Content
from cri_shim.adapters.store import Table
from cri_shim.model.ids import Digest, ImageId
from cri_shim.model.image import ImageRecord, LayerRecord


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of unpacked layers, blobs and compiled modules; `shared` is the part that other images have too."""

    disk: int
    shared: int


@dataclass(frozen=True, slots=True)
class ImageUsage:
    """`layers_in_use` are the layers of containers."""

    images: Table[ImageId, ImageRecord]
    layer_records: Table[Digest, LayerRecord]
    content: Content
    modules: CompiledModules
    layers_in_use: Callable[[], set[Digest]]

    def of_each(self) -> dict[ImageId, Usage]:
        """Every image's share."""
        records = self.images.values()
        users = Counter(part for record in records for part in _parts(record))
        return {
            record.id: Usage(
                disk=sum(map(self._bytes, _parts(record))),
                shared=sum(self._bytes(part) for part in _parts(record) if users[part] > 1),
            )
            for record in records
        }

    def freed_without(self, gone: Collection[ImageId]) -> int:
        """Bytes that the removal of these images gives back."""
        records = self.images.values()
        kept = {part for record in records if record.id not in gone for part in _parts(record)}
        kept |= {f"layer {key}" for key in self.layers_in_use()}
        parts = {part for record in records if record.id in gone for part in _parts(record)}
        return sum(map(self._bytes, parts - kept))

    def _bytes(self, part: str) -> int:
        kind, _, digest = part.partition(" ")
        if kind == "blob":
            return self.content.size(Digest(digest)) or 0
        if kind == "module":
            return self.modules.size(Digest(digest))
        layer = self.layer_records.get(Digest(digest))
        return layer.size if layer is not None else 0


def _parts(record: ImageRecord) -> set[str]:
    """What an image consists of. A digest may stand for several: a module is a blob and its compiled form."""
    kinds = {"blob": record.blobs, "layer": record.layers, "module": record.modules}
    return {f"{kind} {digest}" for kind, digests in kinds.items() for digest in digests}
