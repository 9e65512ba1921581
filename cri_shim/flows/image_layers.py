"""From the layers of a manifest to unpacked layers: download, unpack, commit, each shared by all pulls that need it.

Not the pull itself (`cri_shim.flows.image_pull`). Invariant: layers download and unpack side by side, but commit in
chain order, since a layer may take directories and files from those below it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from cri_shim.adapters.content import Content
from cri_shim.adapters.layers import Layers
from cri_shim.adapters.registry import Repository
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Table
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.inflight import InFlight
from cri_shim.model.ids import Digest
from cri_shim.model.image import LayerRecord
from cri_shim.model.layout import Layout
from cri_shim.wire.oci_image import Descriptor, ImagePlan, Layer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    """Where the content of one image comes from; `image` names it in errors."""

    repository: Repository
    plan: ImagePlan
    image: str


@dataclass(slots=True)
class LayerPuller:
    """`parallel` bounds the downloads of the whole daemon."""

    layout: Layout
    content: Content
    layers: Layers
    records: Table[Digest, LayerRecord]
    collector: ImageCollector
    parallel: int
    _downloads: asyncio.Semaphore = field(init=False)
    _blobs: InFlight[Digest, None] = field(default_factory=lambda: InFlight(cancel_when_abandoned=True))
    _making: InFlight[Digest, LayerRecord] = field(default_factory=lambda: InFlight(cancel_when_abandoned=True))

    def __post_init__(self) -> None:
        self._downloads = asyncio.Semaphore(self.parallel)

    async def pull(self, source: Source) -> tuple[LayerRecord, ...]:
        """All layers of the plan, bottom first. The caller holds their diff IDs and chain IDs."""
        if source.plan.layers:
            self.layers.require_root(source.image)
        return tuple(await all_of(self._layer(source, position) for position in range(len(source.plan.layers))))

    async def fetch(self, repository: Repository, descriptor: Descriptor, what: str) -> None:
        """Have a blob in the content directory. The caller holds its digest."""
        if not self.content.has(descriptor.id):
            await self._blobs.join(descriptor.id, lambda: self._download(repository, descriptor, what))

    async def _download(self, repository: Repository, descriptor: Descriptor, what: str) -> None:
        async with self.collector.hold((descriptor.id,)), self._downloads:
            if self.content.has(descriptor.id):
                return
            ingest = self.content.ingest(descriptor.id, descriptor.size, what)
            try:
                await repository.blob(ingest, self.layout.root)
                await self.content.commit(ingest)
            except BaseException:
                await to_the_end(asyncio.to_thread(ingest.discard))
                raise

    async def _layer(self, source: Source, position: int) -> LayerRecord:
        layer = source.plan.layers[position]
        known = self.records.get(layer.chain_id)
        if known is not None and known.diff_id == layer.diff_id:
            return known
        return await self._making.join(layer.chain_id, lambda: self._make(source, position))

    async def _make(self, source: Source, position: int) -> LayerRecord:
        layer = source.plan.layers[position]
        # Its own hold: when all pulls have left, what is committed just then must not stay.
        async with self.collector.hold((layer.diff_id, layer.chain_id)):
            shared = self.records.get(layer.diff_id)
            if shared is not None and await self._fits(shared, source, position):
                return shared
            return await self._unpack(source, position, layer)

    async def _fits(self, shared: LayerRecord, source: Source, position: int) -> bool:
        """True when a layer that was unpacked elsewhere is right on top of the layers below this one."""
        if position == 0:
            return True
        if shared.needs_parents:
            return False
        return not shared.inherits_root or await self.layers.has_plain_root(await self._layer(source, position - 1))

    async def _unpack(self, source: Source, position: int, layer: Layer) -> LayerRecord:
        what = f"layer {layer.descriptor.digest} of {source.image}"
        async with self.collector.hold((layer.descriptor.id,)):
            await self.fetch(source.repository, layer.descriptor, what)
            unpacked = await self.layers.unpack(self.content.path(layer.descriptor.id), layer, what)
        try:
            below = [await self._layer(source, lower) for lower in range(position)]
            record = await self.layers.commit(unpacked, below)
        except BaseException:
            await to_the_end(self.layers.discard(unpacked))
            raise
        return await self._keep(record)

    async def _keep(self, record: LayerRecord) -> LayerRecord:
        twin = self.records.get(record.key)
        if twin is not None:
            # The same layer, above other ones, was faster.
            await to_the_end(self.layers.remove(record.number))
            return twin
        try:
            await self.records.put(record)
        except Exception:
            await to_the_end(self.layers.remove(record.number))
            raise
        return record


async def all_of(steps: Iterable[Awaitable[T]]) -> list[T]:
    """Run side by side; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_awaited(step)) for step in steps]
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [task.result() for task in tasks]


async def _awaited(step: Awaitable[T]) -> T:
    return await step


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
