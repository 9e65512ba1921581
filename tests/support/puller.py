"""The image side of a daemon, wired as the daemon does it, for tests of pulls without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cri_shim.adapters.compiled_modules import CompiledModules
from cri_shim.adapters.content import Content
from cri_shim.adapters.layers import Layers
from cri_shim.adapters.registry import Registry
from cri_shim.adapters.registry_auth import RegistryAuth
from cri_shim.adapters.store import Store
from cri_shim.adapters.zygote import Zygote
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.image_layers import LayerPuller
from cri_shim.flows.image_layout import ImageLayout
from cri_shim.flows.image_names import ImageNames
from cri_shim.flows.image_progress import LayerProgress
from cri_shim.flows.image_pull import PullImage, PullPolicy
from cri_shim.flows.image_query import ImageQuery
from cri_shim.flows.image_remove import RemoveImage
from cri_shim.model.ids import Digest
from cri_shim.model.image import ImageRecord
from cri_shim.model.layout import Layout
from cri_shim.pb import api_pb2 as pb
from cri_shim.wire.oci_image import host_platforms
from cri_shim.wire.proxy import Proxies


class Node:
    """Everything that images need, below `base`. `open` before use, `close` after."""

    def __init__(
        self,
        base: Path,
        *,
        stall_seconds: float = 60.0,
        keep_blobs: bool = False,
        serve_local: bool = False,
        auth: RegistryAuth | None = None,
        proxies: Proxies | None = None,
    ) -> None:
        self.base = base
        self.layout = Layout(base / "root", base / "state")
        self.layout.root.mkdir(exist_ok=True)
        self.certs = base / "certs"
        self.store = Store.open(self.layout.database)
        self.zygote = Zygote()
        self.in_use: set[Digest] = set()
        self.wants_wasm: bool | None = None
        clock = itertools.count(1_700_000_000_000_000_000)
        self.content = Content(self.layout)
        self.registry = Registry(
            [self.certs], auth=auth, proxies=proxies, stall_seconds=stall_seconds, delays=(0.01, 0.02)
        )
        self.layers = layers = Layers(self.layout, self.zygote, privileged=os.geteuid() == 0)
        images, records = self.store.images, self.store.layers
        self.modules = CompiledModules(self.layout.wasm_cache, images)
        self.now: Callable[[], int] = lambda: next(clock)
        self.collector = ImageCollector(
            images, records, self.content, layers, self.modules, self.store.pulls, lambda: self.in_use, self._time
        )
        self.puller = LayerPuller(self.layout, self.content, layers, records, self.collector, parallel=3)
        policy = PullPolicy(
            host=host_platforms(os.uname().machine),
            keep_blobs=keep_blobs,
            serve_local=serve_local,
            wants_wasm=lambda _: self.wants_wasm,
            now=lambda: next(clock),
        )
        self.image_layout = ImageLayout(images, self.content, self.layout)
        self.names = ImageNames(images, self.image_layout)
        self.pull_image = PullImage(
            policy,
            self.registry,
            self.content,
            images,
            self.names,
            self.collector,
            self.puller,
            came=lambda _: None,
        )
        self.progress = LayerProgress(self.store.pulls, records, self.content)
        self.query = ImageQuery(
            images,
            records,
            self.content,
            self.modules,
            self.layout,
            ("*/pinned*",),
            lambda: (7, 2),
            _pick,
            lambda: next(clock),
        )
        self.remove_image = RemoveImage(images, self.collector, self.image_layout)

    def _time(self) -> int:
        return self.now()

    async def open(self) -> None:
        await self.collector.repair()

    async def close(self) -> None:
        await self.pull_image.drain()
        await self.registry.aclose()
        await self.zygote.aclose()
        self.store.close()

    def be_patient(self) -> None:
        """A registry that does not misbehave is slow at most."""
        self.registry._stall_seconds = 60

    async def pull(self, name: str, auth: pb.AuthConfig | None = None) -> str:
        request = pb.PullImageRequest(image=pb.ImageSpec(image=name), auth=auth)
        return (await self.pull_image(request)).image_ref

    async def status(self, name: str) -> pb.Image | None:
        answer = await self.query.image_status(pb.ImageStatusRequest(image=pb.ImageSpec(image=name)))
        return answer.image if answer.HasField("image") else None

    async def listed(self) -> Sequence[pb.Image]:
        return (await self.query.list_images(pb.ListImagesRequest())).images

    async def remove(self, name: str) -> None:
        await self.remove_image(pb.RemoveImageRequest(image=pb.ImageSpec(image=name)))

    def blobs(self) -> set[str]:
        """Digests of the blobs on disk."""
        return {f"sha256:{name}" for name in os.listdir(self.layout.images / "blobs" / "sha256")}

    async def settled(self) -> None:
        """Returns when work that was abandoned has cleaned up behind itself; AssertionError if it does not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                while self.debris():
                    await asyncio.sleep(0.01)
        left = self.debris()
        assert not left, left

    def debris(self) -> list[str]:
        """What only a running pull may have: unfinished layers, and partials, layers and blobs that no record names.

        Records are those of images and of unfinished pulls.
        """
        images, pulls = self.store.images.values(), self.store.pulls.values()
        layers = {str(record.number) for record in self.store.layers.values()}
        wanted = {digest for record in images for digest in record.blobs}
        wanted |= {digest for pull in pulls for digest in (*pull.blobs, *(blob for blob, _, _ in pull.layers))}
        used = {key for record in images for key in record.layers}
        used |= {key for pull in pulls for _, *keys in pull.layers for key in keys}
        return [
            *(self.partials().keys() - wanted),
            *(name for name in os.listdir(self.layout.layers) if name not in layers),
            *(self.blobs() - wanted),
            *(set(self.store.layers.keys()) - used - self.in_use),
        ]

    def partials(self) -> dict[str, int]:
        """Digest and bytes of each partial on disk."""
        found = {}
        for path in self.layout.partials.iterdir():
            with contextlib.suppress(FileNotFoundError):  # just gone
                found[f"sha256:{path.name}"] = path.stat().st_size
        return found

    def is_empty(self) -> bool:
        """Nothing of any image is on disk, nor a record of one."""
        records = (*self.store.images.values(), *self.store.layers.values(), *self.store.pulls.values())
        return not (records or self.blobs() or self.partials() or os.listdir(self.layout.layers))


def _pick(found: Sequence[ImageRecord], handler: str) -> ImageRecord:
    return next((image for image in found if image.is_wasm == (handler == "wasm")), found[0])
