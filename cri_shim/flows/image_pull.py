"""PullImage: from a reference to a record whose content is on disk, verified.

    parse ─▶ join a running pull of the same ─▶ resolve ─▶ choose a platform ─▶ fetch config and layers ─▶ record

Not the transport (`cri_shim.adapters.registry`) and not the layers (`cri_shim.flows.image_layers`). Invariant: a pull
that fails or is abandoned leaves no image. What it has fetched stays where the next attempt can go on from it (the
registry failed, the caller left, the daemon was killed), under a record of the unfinished pull, and goes where it
cannot (the image is not one that this node takes, the disk is full).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from cri_shim.adapters.content import Content
from cri_shim.adapters.origin import Origin
from cri_shim.adapters.registry import Document, Registry
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Table
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.image_layers import LayerPuller, Source
from cri_shim.flows.image_names import ImageNames
from cri_shim.flows.inflight import InFlight
from cri_shim.log import get_logger
from cri_shim.model.errors import InvalidArgument, PullError, ResourceExhausted
from cri_shim.model.ids import Digest, ImageId
from cri_shim.model.image import ImageRecord, LayerRecord, Platform, UnfinishedPull, WasmModule
from cri_shim.model.refs import ImageRef, parse_reference
from cri_shim.pb import api_pb2 as pb
from cri_shim.wire.oci_image import (
    Descriptor,
    ImagePlan,
    Index,
    Manifest,
    check_platform,
    choose,
    parse_document,
    plan_image,
)
from cri_shim.wire.registry import Credentials, Failure, RegistryError, parse_credentials

log = get_logger()

_MAX_CONFIG = 8 << 20


@dataclass(frozen=True, slots=True)
class PullPolicy:
    """What of the node decides about a pull."""

    host: tuple[Platform, ...]
    keep_blobs: bool
    serve_local: bool
    """A tag that is here is good enough when its registry cannot be reached."""
    wants_wasm: Callable[[pb.PullImageRequest], bool | None]
    """The kind of image that the request asks for; None when either will do."""
    now: Callable[[], int]
    """Unix time, ns."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One pull. Equal jobs are the same work."""

    ref: ImageRef
    credentials: Credentials | None
    wants_wasm: bool | None


@dataclass(frozen=True, slots=True)
class Wish:
    """Which image: its name in errors, and which kind goes first where there are several."""

    name: str
    wants_wasm: bool | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """What the reference stands for: a manifest, and the index that it was chosen from."""

    manifest: Document
    parsed: Manifest
    index: Document | None
    entry: Descriptor | None

    @property
    def digest(self) -> Digest:
        """The digest that the image has where it comes from."""
        return self.index.digest if self.index is not None else self.manifest.digest


@dataclass(slots=True)
class PullImage:
    """The RPC."""

    policy: PullPolicy
    registry: Registry
    content: Content
    images: Table[ImageId, ImageRecord]
    names: ImageNames
    collector: ImageCollector
    puller: LayerPuller
    came: Callable[[ImageRecord], None]
    """Told of each image that has come."""
    _running: InFlight[_Job, ImageId] = field(default_factory=lambda: InFlight(cancel_when_abandoned=True))

    async def __call__(self, request: pb.PullImageRequest) -> pb.PullImageResponse:
        """Pull, or join who pulls the same. InvalidArgument, PullError, ResourceExhausted, FailedPrecondition."""
        if not request.image.image:
            raise InvalidArgument("image.image is empty")
        job = _Job(parse_reference(request.image.image), _credentials(request), self.policy.wants_wasm(request))
        image_id = await self._running.join(job, lambda: self._pull_or_serve_local(job))
        return pb.PullImageResponse(image_ref=image_id)

    async def drain(self) -> None:
        """Wait for the pulls that run; at the stop of the daemon."""
        await self._running.drain()

    async def _pull_or_serve_local(self, job: _Job) -> ImageId:
        """What is here under the tag is good enough, where the policy says so, when no registry can be reached."""
        try:
            return await self._pull(job)
        except RegistryError as error:
            offline = self.policy.serve_local and error.failure is Failure.UNAVAILABLE
            here = await self._tagged(job) if offline else None
            if here is None:
                raise
            log.warning("image served as it is here", image=job.ref.text, id=here.id, error=str(error))
            return here.id

    async def _tagged(self, job: _Job) -> ImageRecord | None:
        tagged = [record for record in self.images.values() if job.ref.repo_tag in record.repo_tags]
        return await self._chosen(tagged, job.wants_wasm)

    async def _chosen(self, records: Iterable[ImageRecord], wants_wasm: bool | None) -> ImageRecord | None:
        """The one that a pull would choose, if it is here: what an index offers, the index says, which is here too."""
        for record in records:
            if record.index is None:
                return record
            index = parse_document(await self.content.read(record.index), "")
            if isinstance(index, Index):
                choice = choose(index, self.policy.host, wants_wasm=wants_wasm)
                if choice.id == record.manifest:
                    return record
        return None

    async def _pull(self, job: _Job) -> ImageId:
        present = await self._present(job)
        if present is not None and await self.names.add_digest(present.id, job.ref.repo_digest):
            return present.id
        repository = await self.registry.repository(job.ref, job.credentials)
        tags = () if job.ref.repo_tag is None else (job.ref.repo_tag,)

        async def keep(record: ImageRecord, digest: Digest) -> None:
            await self.names.commit(record, tags=tags, digests=(job.ref.at(digest),))

        return await self.take(repository, Wish(job.ref.text, job.wants_wasm), keep)

    async def take(self, origin: Origin, wish: Wish, keep: Callable[[ImageRecord, Digest], Awaitable[None]]) -> ImageId:
        """Have an image on disk, wherever it comes from; `keep` gets its record and its digest there, and names it."""
        try:
            return await self._take(origin, wish, keep)
        except ResourceExhausted:
            # Others need the room more than the pulls that may go on some day.
            await to_the_end(self.collector.give_up(*self.collector.pulls.values()))
            raise

    async def _take(
        self, origin: Origin, wish: Wish, keep: Callable[[ImageRecord, Digest], Awaitable[None]]
    ) -> ImageId:
        found = await self._find(origin, wish)
        documents = [found.manifest, *([found.index] if found.index else [])]
        config = found.parsed.config
        async with self.collector.hold((*(document.digest for document in documents), config.id)):
            for document in documents:
                await self.content.put(document.digest, document.body)
            plan = await self._plan(origin, found, wish.name)
            async with self.collector.hold(self._content_of(plan)), self._unfinished(found, plan, wish.name):
                layers = await self._fetch(Source(origin, plan, wish.name))
                record = self._record(found, plan, layers)
                await keep(record, found.digest)
        self.came(record)
        return record.id

    @contextlib.asynccontextmanager
    async def _unfinished(self, found: _Found, plan: ImagePlan, name: str) -> AsyncGenerator[None]:
        """Keep what has come for the next attempt, unless the block ends well or that would be of no use."""
        pull = UnfinishedPull(
            manifest=found.manifest.digest,
            reference=name,
            started_at=self.policy.now(),
            blobs=tuple(self._blobs_of(found, plan)),
            layers=tuple((layer.descriptor.id, layer.diff_id, layer.chain_id) for layer in plan.layers),
        )
        await self.collector.expire()
        await self.collector.pulls.put(pull)
        of_no_use: tuple[UnfinishedPull, ...] = (pull,)
        try:
            yield
        except (RegistryError, asyncio.CancelledError):
            if self._has_begun(plan):
                of_no_use = ()
            raise
        finally:
            await to_the_end(self.collector.give_up(*of_no_use))

    def _has_begun(self, plan: ImagePlan) -> bool:
        """More is here than the documents."""
        partials, records = self.content.partials(), self.collector.layer_records
        content = (*self._content_of(plan), *(layer.descriptor.id for layer in plan.layers))
        return any(digest in partials or self.content.has(digest) or records.get(digest) for digest in content)

    async def _present(self, job: _Job) -> ImageRecord | None:
        """Content by digest cannot have changed: no registry needs to be asked."""
        digest = job.ref.digest
        if digest is None:
            return None
        records = self.images.values()
        by_manifest = next((record for record in records if record.manifest == digest), None)
        known = (r for r in records if digest in {r.index, *(name.rpartition("@")[2] for name in r.repo_digests)})
        return by_manifest or await self._chosen(known, job.wants_wasm)

    async def _find(self, origin: Origin, wish: Wish) -> _Found:
        document = await origin.resolve()
        parsed = parse_document(document.body, document.media_type)
        if isinstance(parsed, Manifest):
            return _Found(document, parsed, None, None)
        entry = choose(parsed, self.policy.host, wants_wasm=wish.wants_wasm)
        manifest = await self._manifest(origin, entry)
        inner = parse_document(manifest.body, manifest.media_type)
        if isinstance(inner, Index):
            msg = f"{wish.name} is an index of indexes, which is not supported"
            raise PullError(msg)
        return _Found(manifest, inner, document, entry)

    async def _manifest(self, origin: Origin, entry: Descriptor) -> Document:
        if self.content.has(entry.id):
            return Document(await self.content.read(entry.id), entry.media_type, entry.id)
        return await origin.manifest(entry.id)

    async def _plan(self, origin: Origin, found: _Found, name: str) -> ImagePlan:
        descriptor = found.parsed.config
        if descriptor.size > _MAX_CONFIG:
            msg = f"the config of {name} has {descriptor.size} bytes, at most {_MAX_CONFIG} are allowed"
            raise PullError(msg)
        await self.puller.fetch(origin, descriptor, f"config {descriptor.digest} of {name}")
        config = await self.content.read(descriptor.id)
        plan = plan_image(found.parsed, found.manifest.digest, config, found.entry)
        check_platform(plan, self.policy.host)
        return plan

    async def _fetch(self, source: Source) -> tuple[LayerRecord, ...]:
        wasm = source.plan.wasm
        if wasm is not None:
            await self.puller.fetch(source.origin, wasm, f"Wasm module {wasm.digest} of {source.image}")
        layers = await self.puller.pull(source)
        if self.policy.keep_blobs:
            for layer in source.plan.layers:
                what = f"layer {layer.descriptor.digest} of {source.image}"
                await self.puller.fetch(source.origin, layer.descriptor, what)
        return layers

    def _content_of(self, plan: ImagePlan) -> Iterable[Digest]:
        """What has to stay while the pull runs, besides the documents."""
        for layer in plan.layers:
            yield from (layer.diff_id, layer.chain_id)
            if self.policy.keep_blobs:
                yield layer.descriptor.id
        if plan.wasm is not None:
            yield plan.wasm.id

    def _record(self, found: _Found, plan: ImagePlan, layers: tuple[LayerRecord, ...]) -> ImageRecord:
        wasm = None
        if plan.wasm is not None:
            wasm = WasmModule(plan.wasm.id, plan.wasm.media_type, plan.wasm.size)
        return ImageRecord(
            id=plan.id,
            manifest=found.manifest.digest,
            index=found.index.digest if found.index is not None else None,
            config_digest=found.parsed.config.id,
            size=plan.size,
            platform=plan.platform,
            config=plan.config,
            pulled_at=self.policy.now(),
            annotations=plan.annotations,
            layers=tuple(layer.key for layer in layers),
            wasm=wasm,
            blobs=tuple(dict.fromkeys(self._blobs_of(found, plan))),
        )

    def _blobs_of(self, found: _Found, plan: ImagePlan) -> Iterable[Digest]:
        """What stays as it was transferred."""
        yield from (found.digest, found.manifest.digest, found.parsed.config.id)
        if plan.wasm is not None:
            yield plan.wasm.id
        if self.policy.keep_blobs:
            yield from (layer.descriptor.id for layer in plan.layers)


def _credentials(request: pb.PullImageRequest) -> Credentials | None:
    auth = request.auth
    return parse_credentials(
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
        server_address=auth.server_address,
    )
