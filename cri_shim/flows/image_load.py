"""LoadImages of the admin service, and the directory of archives that are loaded at the start.

The images of an archive go the way of a pull, with the same checks; only where they come from is another
(`cri_shim.adapters.image_archive`). Invariant: one image that cannot be taken does not stop the others, and is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cri_shim.adapters.image_archive import ArchivedImage, Archives
from cri_shim.flows.image_names import ImageNames
from cri_shim.flows.image_progress import LayerProgress
from cri_shim.flows.image_pull import PullImage, Wish
from cri_shim.log import get_logger
from cri_shim.model.errors import CriShimError, InvalidArgument, PullError
from cri_shim.model.ids import Digest, ImageId
from cri_shim.model.image import ImageRecord
from cri_shim.model.refs import parse_reference
from cri_shim.pb import admin_pb2 as pb
from cri_shim.wire.oci_image import Index, choose, parse_document

log = get_logger()

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")


@dataclass(frozen=True, slots=True)
class LoadImages:
    """The RPC."""

    archives: Archives
    pull: PullImage
    names: ImageNames
    progress: LayerProgress

    async def __call__(self, request: pb.LoadImagesRequest) -> AsyncGenerator[pb.LoadImagesResponse]:
        """How far each image has come, and what it is when it is there.

        Errors come at the end: of the first that could not be taken.
        """
        path = Path(request.path)
        if not path.is_absolute():
            msg = f"the path {request.path!r} is not absolute"
            raise InvalidArgument(msg)
        async for answer in self.load(path, name=request.name, pin=request.pin):
            yield answer

    async def load(
        self, path: Path, *, name: str = "", pin: bool = False, placed_at: int | None = None
    ) -> AsyncGenerator[pb.LoadImagesResponse]:
        """`name` is for the one image of an archive; `pin` keeps all of them from garbage collection.

        Tags that came to this node after `placed_at` (Unix ns) stay where they are.
        """
        given = () if not name else (_tag(name),)
        failures: list[PullError] = []
        async with self.archives.open(path) as archive:
            images = await archive.images()
            if given and len(images) > 1:
                msg = f"a name is given, and {path} has {len(images)} images"
                raise InvalidArgument(msg, hint="load them as they are called, and use tag")
            for image in images:
                tags = self._wanted(given or image.names, placed_at)
                if image.names and not tags:
                    continue
                called = tags[0] if tags else f"the image in {path}"
                try:
                    for wants_wasm in await self._kinds(image):
                        taking = asyncio.ensure_future(self._take(image, tags, Wish(called, wants_wasm), pin=pin))
                        async for layers in self.progress.of(taking, called):
                            yield pb.LoadImagesResponse(layers=layers)
                        yield pb.LoadImagesResponse(id=taking.result(), tags=tags)
                except PullError as error:
                    failures.append(error)
        if failures:
            rest = f"{len(failures)} of {len(images)} images of the archive were not loaded" if len(images) > 1 else ""
            raise PullError(failures[0].cause, hint=failures[0].hint or rest)

    def _wanted(self, tags: Sequence[str], placed_at: int | None) -> tuple[str, ...]:
        if placed_at is None:
            return tuple(tags)
        newer = (record for record in self.names.images.values() if record.pulled_at > placed_at)
        taken = {tag for record in newer for tag in record.repo_tags}
        return tuple(tag for tag in tags if tag not in taken)

    async def _kinds(self, image: ArchivedImage) -> tuple[bool | None, ...]:
        """Of an index Linux and Wasm, as far as the archive has them; nobody could fetch the other one later."""
        document = await image.origin.resolve()
        index = parse_document(document.body, document.media_type)
        if not isinstance(index, Index):
            return (None,)
        host = self.pull.policy.host
        kinds = {choose(index, host, wants_wasm=wants_wasm).id: wants_wasm for wants_wasm in (False, True)}
        return tuple(kind for digest, kind in kinds.items() if image.origin.has(digest)) or (None,)

    async def _take(self, image: ArchivedImage, tags: Sequence[str], wish: Wish, *, pin: bool) -> ImageId:
        async def keep(record: ImageRecord, digest: Digest) -> None:
            del digest  # which registry has it, if any, the archive does not say
            await self.names.commit(record, tags=tags, pins=(tags or (record.id,)) if pin else ())

        return await self.pull.take(image.origin, wish, keep)


@dataclass(slots=True)
class ImportImages:
    """Loads every archive of a directory at the start, beside everything else. What comes from there is pinned.

    What has been pulled since the archive was put there wins over it, and what is here needs no second load.
    """

    loading: LoadImages
    directory: Path | None
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        if self.directory is not None:
            self._task = asyncio.get_running_loop().create_task(self._run(self.directory))

    async def aclose(self) -> None:
        """End, whatever is being loaded: the next start goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self, directory: Path) -> None:
        try:
            paths = await asyncio.to_thread(_archives_in, directory)
        except OSError as error:
            log.error("cannot read the directory of archives", path=str(directory), error=error.strerror)
            return
        for path in paths:
            try:
                placed_at = (await asyncio.to_thread(path.stat)).st_ctime_ns
                async for loaded in self.loading.load(path, pin=True, placed_at=placed_at):
                    if loaded.id:
                        log.info("image loaded", path=str(path), id=loaded.id, tags=list(loaded.tags))
            except (CriShimError, OSError) as error:
                log.error("archive not loaded", path=str(path), error=str(error))


def _archives_in(directory: Path) -> list[Path]:
    return sorted(path.absolute() for path in directory.iterdir() if path.name.endswith(SUFFIXES))


def _tag(name: str) -> str:
    tag = parse_reference(name).repo_tag
    if tag is None:
        msg = f"{name!r} has a digest: a tag cannot have one"
        raise InvalidArgument(msg)
    return tag
