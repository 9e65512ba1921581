"""How far the layers of an image have come that is being pulled or loaded, and PullImage of the admin service.

It only looks: what a pull needs stands in the record of the unfinished pull, what is here the content knows. Invariant:
who leaves is one less who waits for the pull, as with any caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from cri_shim.adapters.content import Content
from cri_shim.adapters.store import Table
from cri_shim.flows.image_pull import PullImage
from cri_shim.model.ids import Digest
from cri_shim.model.image import LayerRecord, UnfinishedPull
from cri_shim.model.refs import parse_reference
from cri_shim.pb import admin_pb2, api_pb2
from cri_shim.wire.oci_image import Manifest, parse_document

_LOOK_SECONDS: Final = 0.2


T = TypeVar("T")
Layers: TypeAlias = list[admin_pb2.LayerProgress]


@dataclass(frozen=True, slots=True)
class PullWithProgress:
    """The RPC."""

    pull: PullImage
    progress: LayerProgress

    async def __call__(self, request: admin_pb2.PullImageRequest) -> AsyncGenerator[admin_pb2.PullImageResponse]:
        """All layers whenever one has come further, the id at the end. Errors as PullImage of the CRI."""
        spec = api_pb2.ImageSpec(image=request.image, runtime_handler=request.runtime_handler)
        name = parse_reference(request.image).text
        pulling = asyncio.ensure_future(self.pull(api_pb2.PullImageRequest(image=spec)))
        async for layers in self.progress.of(pulling, name):
            yield admin_pb2.PullImageResponse(layers=layers)
        yield admin_pb2.PullImageResponse(id=pulling.result().image_ref)


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """Looks at what unfinished pulls, loads among them, have and lack."""

    pulls: Table[Digest, UnfinishedPull]
    layers: Table[Digest, LayerRecord]
    content: Content

    async def of(self, pulling: asyncio.Future[T], name: str) -> AsyncGenerator[Layers]:
        """All layers whenever one has come further, until the task ends, which is cancelled by who leaves before."""
        told: Layers = []
        try:
            while not pulling.done():
                await asyncio.wait((pulling,), timeout=_LOOK_SECONDS)
                known = await self._layers(name) or [_done(layer) for layer in told]
                if known != told:
                    told = known
                    yield told
        finally:
            pulling.cancel()  # nothing, once it has ended
            await asyncio.wait((pulling,))
            if not pulling.cancelled():
                pulling.exception()  # whoever has left does not ask for it

    async def _layers(self, name: str) -> Layers:
        """Nothing before the pull knows what it needs, and after its end."""
        pull = next((pull for pull in self.pulls.values() if pull.reference == name), None)
        if pull is None or not self.content.has(pull.manifest):
            return []
        manifest = parse_document(await self.content.read(pull.manifest), "")
        if not isinstance(manifest, Manifest):
            return []
        unpacked = {blob: (diff_id, chain_id) for blob, diff_id, chain_id in pull.layers}
        return [self._layer(layer.id, layer.size, unpacked.get(layer.id)) for layer in manifest.layers]

    def _layer(self, blob: Digest, size: int, keys: tuple[Digest, Digest] | None) -> admin_pb2.LayerProgress:
        """`keys` are those of the unpacked layer, None for a module, which stays as it is."""
        kind = admin_pb2.LayerProgress
        arriving = self.content.arriving().get(blob)
        if keys is not None and any(self.layers.get(key) is not None for key in keys):
            return kind(digest=blob, state=kind.DONE, received=size, size=size)
        if arriving is not None:
            return kind(digest=blob, state=kind.DOWNLOADING, received=arriving[0], size=size)
        if self.content.has(blob):
            return kind(digest=blob, state=kind.DONE if keys is None else kind.UNPACKING, received=size, size=size)
        return kind(digest=blob, state=kind.WAITING, received=self.content.partials().get(blob, 0), size=size)


def _done(layer: admin_pb2.LayerProgress) -> admin_pb2.LayerProgress:
    kind = admin_pb2.LayerProgress
    return kind(digest=layer.digest, state=kind.DONE, received=layer.size, size=layer.size)
