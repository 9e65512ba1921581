"""ListImages, ImageStatus and ImageFsInfo: answered from memory, never from the disk.

Invariant: no call here waits for anything, so a kubelet that polls is never slowed down by a pull.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from cri_shim.adapters.compiled_modules import CompiledModules
from cri_shim.adapters.content import Content
from cri_shim.adapters.store import Table
from cri_shim.model.errors import InvalidArgument
from cri_shim.model.ids import Digest, ImageId
from cri_shim.model.image import ImageRecord, LayerRecord
from cri_shim.model.layout import Layout
from cri_shim.model.refs import find_images
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.image_pins import is_pinned

_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ImageQuery:
    """The reading RPCs. `pinned` are globs over names, `written` the bytes and inodes of all writable layers, `pick`
    chooses between the platforms of one name by the handler that is to run it.
    """

    images: Table[ImageId, ImageRecord]
    layer_records: Table[Digest, LayerRecord]
    content: Content
    modules: CompiledModules
    layout: Layout
    pinned: Sequence[str]
    written: Callable[[], tuple[int, int]]
    pick: Callable[[Sequence[ImageRecord], str], ImageRecord]
    now: Callable[[], int]

    async def list_images(self, request: pb.ListImagesRequest) -> pb.ListImagesResponse:
        """All images, or those that the filter's reference names."""
        records: Sequence[ImageRecord] = self.images.values()
        if request.filter.image.image:
            records = find_images(records, request.filter.image.image)
        return pb.ListImagesResponse(images=[self._image(record) for record in records])

    async def image_status(self, request: pb.ImageStatusRequest) -> pb.ImageStatusResponse:
        """One image; without one the answer has none, and that is no error."""
        if not request.image.image:
            raise InvalidArgument("image.image is empty")
        found = find_images(self.images.values(), request.image.image)
        if not found:
            return pb.ImageStatusResponse()
        record = self.pick(found, request.image.runtime_handler)
        info = {"info": _verbose(record)} if request.verbose else {}
        return pb.ImageStatusResponse(image=self._image(record), info=info)

    async def image_fs_info(self, request: pb.ImageFsInfoRequest) -> pb.ImageFsInfoResponse:
        """What images take (blobs, unpacked layers, compiled modules), and what containers have written.

        All of it is on one file system.
        """
        del request
        layers = [(layer.size, layer.inodes) for layer in self.layer_records.values()]
        sizes, inodes = zip(self.content.usage(), self.modules.usage(), *layers, strict=True)
        images = sum(sizes), sum(inodes)
        return pb.ImageFsInfoResponse(
            image_filesystems=[self._filesystem(*images)], container_filesystems=[self._filesystem(*self.written())]
        )

    def _filesystem(self, used: int, inodes: int) -> pb.FilesystemUsage:
        return pb.FilesystemUsage(
            timestamp=self.now(),
            fs_id=pb.FilesystemIdentifier(mountpoint=str(self.layout.root)),
            used_bytes=pb.UInt64Value(value=used),
            inodes_used=pb.UInt64Value(value=inodes),
        )

    def _image(self, record: ImageRecord) -> pb.Image:
        uid, username = _user(record.config.user)
        names = (*record.repo_tags, *record.repo_digests)
        return pb.Image(
            id=record.id,
            repo_tags=record.repo_tags,
            repo_digests=record.repo_digests,
            size=record.size,
            uid=None if uid is None else pb.Int64Value(value=uid),
            username=username,
            spec=pb.ImageSpec(image=names[0] if names else record.id, annotations=record.annotations),
            pinned=is_pinned(record, self.pinned),
        )


def _user(user: str) -> tuple[int | None, str]:
    """The user of an image config, without its group: a uid, or a name, or neither."""
    name = user.partition(":")[0]
    if name.isascii() and name.isdigit() and int(name) <= _INT64_MAX:
        return int(name), ""
    return None, name


def _verbose(record: ImageRecord) -> str:
    """JSON for `crictl inspecti`, in the shape that containerd gives it, with what we know besides."""
    run = record.config
    facts = {
        "chainID": record.layers[-1] if record.layers else "",
        "imageSpec": {
            "os": record.platform.os,
            "architecture": record.platform.architecture,
            "variant": record.platform.variant,
            "config": {
                "User": run.user,
                "ExposedPorts": {port: {} for port in run.exposed_ports},
                "Env": run.env,
                "Entrypoint": run.entrypoint,
                "Cmd": run.cmd,
                "Volumes": {volume: {} for volume in run.volumes},
                "WorkingDir": run.working_dir,
                "Labels": run.labels,
                "StopSignal": run.stop_signal,
            },
        },
        "manifest": record.manifest,
        "index": record.index,
        "layers": record.layers,
        "wasm": record.wasm,
        "pulledAt": record.pulled_at,
    }
    return msgspec.json.encode(facts).decode()
