"""From the layers of a manifest to unpacked layers: download, unpack, commit, each shared by all pulls that need it.

    bytes arrive ─▶ partial file ──▶ verified ─────────┐
                       └─▶ unpacker, as they arrive ───┴─▶ commit in chain order

Not the pull itself (`cri_shim.flows.image_pull`). Invariant: a layer is committed only when its blob and its diff ID
have been verified; layers come and unpack side by side, but commit in chain order, since a layer may take directories
and files from those below it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from cri_shim.adapters.content import Arrival, Content, WrongContentError
from cri_shim.adapters.layers import Layers, Unpacked
from cri_shim.adapters.origin import Origin
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Table
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.inflight import InFlight
from cri_shim.flows.locks import Locks
from cri_shim.model.errors import DeadlineExceeded, PullError
from cri_shim.model.ids import Digest
from cri_shim.model.image import LayerRecord
from cri_shim.model.layout import Layout
from cri_shim.wire.oci_image import Descriptor, ImagePlan, Layer

T = TypeVar("T")

_ATTEMPTS: Final = 3
"""At a blob that turns out wrong where another attempt may turn out right."""
_UNPACK_SECONDS: Final = 1800.0
"""For what is left to do when all of the blob is here."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the content of one image comes from; `image` names it in errors."""

    origin: Origin
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
    _partials: Locks = field(default_factory=Locks)
    _blobs: InFlight[Digest, None] = field(default_factory=lambda: InFlight(cancel_when_abandoned=True))
    _making: InFlight[Digest, LayerRecord] = field(default_factory=lambda: InFlight(cancel_when_abandoned=True))

    def __post_init__(self) -> None:
        self._downloads = asyncio.Semaphore(self.parallel)

    async def pull(self, source: Source) -> tuple[LayerRecord, ...]:
        """All layers of the plan, bottom first. The caller holds their diff IDs and chain IDs."""
        if source.plan.layers:
            self.layers.require_root(source.image)
        return tuple(await all_of(self._layer(source, position) for position in range(len(source.plan.layers))))

    async def fetch(self, origin: Origin, descriptor: Descriptor, what: str) -> None:
        """Have a blob in the content directory. The caller holds its digest."""

        async def attempt() -> None:
            if not self.content.has(descriptor.id):
                await self._blobs.join(descriptor.id, lambda: self._download(origin, descriptor, what))

        await _as_often_as_it_helps(origin, attempt)

    async def _download(
        self, origin: Origin, descriptor: Descriptor, what: str, arrival: Arrival | None = None
    ) -> None:
        """`arrival` gets to know what comes, when it comes."""
        digest = descriptor.id
        # One who has been abandoned may still be letting go of the partial.
        async with self.collector.hold((digest,)), self._downloads, self._partials.hold(digest):
            if self.content.has(digest):
                return
            async with self.content.ingest(digest, descriptor.size, what) as ingest:
                if arrival is not None:
                    ingest.arrival = arrival
                    arrival.begin(ingest.partial)
                await origin.blob(ingest)
                await self.content.commit(ingest)

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
        unpacked: Unpacked | None = None
        try:
            async with self.collector.hold((layer.descriptor.id,)):
                unpacked = await _as_often_as_it_helps(source.origin, lambda: self._obtain(source, layer, what))
            below = [await self._layer(source, lower) for lower in range(position)]
            record = await self.layers.commit(unpacked, below)
        except BaseException:
            if unpacked is not None:
                await to_the_end(self.layers.discard(unpacked))
            raise
        return await self._keep(record)

    async def _obtain(self, source: Source, layer: Layer, what: str) -> Unpacked:
        """Unpack while the blob arrives. When that is another's download, wait for its end first."""
        arrival = Arrival()
        download = asyncio.ensure_future(self._follow(source, layer, what, arrival))
        unpack = asyncio.ensure_future(self._unpack_arriving(layer, what, arrival))
        try:
            await asyncio.wait((download, unpack), return_when=asyncio.FIRST_COMPLETED)
            if not download.done() and isinstance(unpack.exception(), PullError):
                # Is it the archive, or have other bytes come than there should? A blob that is wrong must not stay.
                await download
            if download.done():
                download.result()
                arrival.complete()
            unpacked = await self._finished(unpack, what)
            await download
        except BaseException:
            await to_the_end(self._abandon(download, unpack))
            raise
        finally:
            arrival.close()
        return unpacked

    async def _follow(self, source: Source, layer: Layer, what: str, arrival: Arrival) -> None:
        descriptor = layer.descriptor
        if not self.content.has(descriptor.id):
            await self._blobs.join(descriptor.id, lambda: self._download(source.origin, descriptor, what, arrival))
        arrival.begin(self.content.path(descriptor.id))

    async def _unpack_arriving(self, layer: Layer, what: str, arrival: Arrival) -> Unpacked:
        await arrival.begun.wait()
        return await self.layers.unpack((arrival.file, arrival.progress), layer, what)

    async def _finished(self, unpack: asyncio.Future[Unpacked], what: str) -> Unpacked:
        try:
            async with asyncio.timeout(_UNPACK_SECONDS):
                return await unpack
        except TimeoutError:
            msg = f"{what}: it was not unpacked within {_UNPACK_SECONDS:g} s"
            raise DeadlineExceeded(msg) from None

    async def _abandon(self, download: asyncio.Future[None], unpack: asyncio.Future[Unpacked]) -> None:
        """End both; what has been unpacked nevertheless is removed."""
        download.cancel()
        unpack.cancel()
        await asyncio.wait((download, unpack))
        if not unpack.cancelled() and unpack.exception() is None:
            await self.layers.discard(unpack.result())
        if not download.cancelled():
            download.exception()

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


async def _as_often_as_it_helps(origin: Origin, attempt: Callable[[], Awaitable[T]]) -> T:
    """Again, from the first byte, where wrong content came that may be right the next time."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return await attempt()
        except WrongContentError as error:
            if not origin.worth_another(error):
                raise
    return await attempt()


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
