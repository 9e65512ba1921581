"""RemoveImage: forget an image under all its names, then free what only it needed.

Not garbage collection by age or space: that is the kubelet's decision. Invariant: when the call returns the image is in
no list; layers and compiled modules that a container still uses go with that container.
"""

from __future__ import annotations

from dataclasses import dataclass

from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Table
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.image_layout import ImageLayout
from cri_shim.model.errors import InvalidArgument
from cri_shim.model.ids import ImageId
from cri_shim.model.image import ImageRecord
from cri_shim.model.refs import find_images
from cri_shim.pb import api_pb2 as pb


@dataclass(frozen=True, slots=True)
class RemoveImage:
    """The RPC. An image that is not there is success."""

    images: Table[ImageId, ImageRecord]
    collector: ImageCollector
    layout: ImageLayout

    async def __call__(self, request: pb.RemoveImageRequest) -> pb.RemoveImageResponse:
        """By id, id prefix, or any of its names. InvalidArgument for what is no reference."""
        if not request.image.image:
            raise InvalidArgument("image.image is empty")
        for record in find_images(self.images.values(), request.image.image):
            await self.remove(record)
        return pb.RemoveImageResponse()

    async def remove(self, record: ImageRecord) -> None:
        """Forget one image under all its names."""
        await to_the_end(self._remove(record))

    async def _remove(self, record: ImageRecord) -> None:
        await self.images.forget(record.id)
        await self.layout.write()
        await self.collector.drop_unused((*record.blobs, *record.layers, *record.modules))
