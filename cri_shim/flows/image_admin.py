"""The images of a node as those see them who run it: with all they take, under names that can be given and taken away.

Not the CRI, whose RemoveImage knows no half of an image and asks nobody. Invariant: an image that is pinned, or that a
container was made from, goes only by force.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cri_shim.adapters.store import Store
from cri_shim.flows.image_names import ImageNames
from cri_shim.flows.image_remove import RemoveImage
from cri_shim.flows.image_usage import ImageUsage
from cri_shim.model.errors import InvalidArgument, NotFound, WrongState
from cri_shim.model.ids import SHORT, ImageId
from cri_shim.model.image import ImageRecord
from cri_shim.model.refs import find_images, parse_reference, tag_of
from cri_shim.pb import admin_pb2 as pb
from cri_shim.spec.image_pins import is_configured, is_pinned


@dataclass(frozen=True, slots=True)
class AdministerImages:
    """The RPCs of the admin service that need no registry and no archive. `pinned` are globs over names."""

    store: Store
    names: ImageNames
    usage: ImageUsage
    removal: RemoveImage
    pinned: Sequence[str]

    async def list_images(self, request: pb.ListImagesRequest) -> pb.ListImagesResponse:
        """All images, or those that a reference names."""
        records: Sequence[ImageRecord] = self.store.images.values()
        if request.image:
            records = find_images(records, request.image)
        return pb.ListImagesResponse(images=self._described(records))

    async def remove(self, request: pb.RemoveImageRequest) -> pb.RemoveImageResponse:
        """By tag: that name, and the image with its last tag. By id or digest: the image under all its names."""
        found = self._find(request.image)
        tag = tag_of(request.image, found)
        if not request.force:
            for record in found:
                self._refuse_if_needed(record, tag)
        answer = pb.RemoveImageResponse()
        for record in found:
            if tag is not None and len(record.repo_tags) > 1:
                await self.names.remove_tag(record.id, tag)
                answer.untagged.append(tag)
            else:
                await self.removal.remove(record)
                answer.untagged.extend(record.repo_tags)
                answer.removed.append(record.id)
        return answer

    async def tag(self, request: pb.TagImageRequest) -> pb.TagImageResponse:
        """One more name for an image; the image that had it loses it."""
        tag = parse_reference(request.tag).repo_tag
        if tag is None:
            msg = f"{request.tag!r} has a digest: a tag cannot have one"
            raise InvalidArgument(msg)
        record = self._find(request.image)[0]
        if not await self.names.add_tag(record.id, tag):
            raise _not_here(request.image)
        return pb.TagImageResponse(tag=tag)

    async def pin(self, request: pb.PinImageRequest) -> pb.PinImageResponse:
        """Pin what the reference names: a tag, wherever it will point to, or else the image by its id."""
        found = self._find(request.image)
        name = tag_of(request.image, found)
        if not request.pinned:
            return await self._unpin(request.image, found, name)
        pinned = [record for record in found if await self.names.pin(record.id, name or record.id)]
        if not pinned:
            raise _not_here(request.image)
        return pb.PinImageResponse(names=dict.fromkeys(name or record.id for record in pinned))

    async def prune(self, request: pb.PruneImagesRequest) -> pb.PruneImagesResponse:
        """Remove what no container was made from and nobody has pinned."""
        used = self._containers()
        records = self.store.images.values()
        unused = [record for record in records if record.id not in used and not is_pinned(record, self.pinned)]
        answer = pb.PruneImagesResponse(
            removed=self._described(unused), freed=self.usage.freed_without({record.id for record in unused})
        )
        if not request.dry_run:
            for record in unused:
                await self.removal.remove(record)
        return answer

    async def _unpin(self, text: str, found: Sequence[ImageRecord], name: str | None) -> pb.PinImageResponse:
        answer = pb.PinImageResponse()
        for record in found:
            names = [pin for pin in record.pins if name in {None, pin}]
            await self.names.unpin(record.id, names)
            answer.names.extend(names)
        if not answer.names and (stays := [record for record in found if is_pinned(record, self.pinned)]):
            by_others = ", ".join(stays[0].pins)
            what = f"as {by_others}" if by_others else "by images.pinned of the configuration"
            msg = f"image {text!r} is pinned {what}"
            raise WrongState(msg)
        return answer

    def _find(self, text: str) -> tuple[ImageRecord, ...]:
        if not text:
            raise InvalidArgument("no image is named")
        found = find_images(self.store.images.values(), text)
        if not found:
            raise _not_here(text)
        return found

    def _refuse_if_needed(self, record: ImageRecord, tag: str | None) -> None:
        """Whether the image, or with other tags left the pin on this one, is still wanted."""
        goes = tag is None or len(record.repo_tags) == 1
        if (goes and is_pinned(record, self.pinned)) or tag in record.pins:
            hint = "change images.pinned" if is_configured(record, self.pinned) else "unpin it"
            msg = f"image {tag or record.id} is pinned"
            raise WrongState(msg, hint=f"{hint}, or use force")
        users = self._containers().get(record.id, ()) if goes else ()
        if users:
            shown = ", ".join(user[:SHORT] for user in users[:3]) + (", …" if len(users) > 3 else "")
            msg = f"image {tag or record.id} is used by {len(users)} container(s): {shown}"
            raise WrongState(msg, hint="remove them first, or use force: they keep their files")

    def _containers(self) -> dict[ImageId, list[str]]:
        """The containers of each image, as root file system or as volume."""
        found: dict[ImageId, list[str]] = {}
        for container in self.store.containers.values():
            if not container.infra:
                for image_id in {container.image_id, *(volume.image_id for volume in container.volumes)}:
                    found.setdefault(image_id, []).append(container.id)
        return found

    def _described(self, records: Sequence[ImageRecord]) -> list[pb.Image]:
        usage, containers = self.usage.of_each(), self._containers()
        return [
            pb.Image(
                id=record.id,
                tags=record.repo_tags,
                digests=record.repo_digests,
                platform=record.platform.text,
                wasm=record.wasm is not None,
                size=record.size,
                disk=usage[record.id].disk,
                shared=usage[record.id].shared,
                pinned=is_pinned(record, self.pinned),
                containers=containers.get(record.id, ()),
                pulled_at=record.pulled_at,
            )
            for record in records
        ]


def _not_here(text: str) -> NotFound:
    return NotFound(f"image {text!r} is not on this node")
