"""Image volumes of pods: mounted when the first container asks for one, released when no container has it any more.

Not a use of its own: CreateContainer, RemoveContainer, StopPodSandbox and recovery call it. Invariant: a mounted image
is named by the record of a container of the pod, so that its layers are in use as long as it is mounted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cri_shim.adapters import image_volumes
from cri_shim.adapters.store import Store
from cri_shim.flows.image_gc import ImageCollector
from cri_shim.flows.locks import Locks
from cri_shim.model.container import ContainerRecord, ImageVolume
from cri_shim.model.errors import ImageNotHere, ImageVolumeMountFailed, WrongState
from cri_shim.model.handler import PodContext
from cri_shim.model.ids import SHORT, ImageId, PodId
from cri_shim.model.image import LayerRecord
from cri_shim.model.layout import Layout
from cri_shim.model.pod import PodState
from cri_shim.model.refs import find_images
from cri_shim.pb import api_pb2 as pb


@dataclass(frozen=True, slots=True)
class ImageVolumes:
    """Mounts and releases. The lock is that of the pod: a stop of the pod excludes both."""

    store: Store
    layout: Layout
    collector: ImageCollector
    locks: Locks

    def find(self, config: pb.ContainerConfig) -> tuple[ImageVolume, ...]:
        """The images that the mounts of a request mean, one for each of `image_mounts`."""
        return tuple(self._find(mount) for mount in image_mounts(config))

    async def mount(
        self, record: ContainerRecord, config: pb.ContainerConfig, context: PodContext
    ) -> pb.ContainerConfig:
        """The request with each of its image volumes at a host path. The record is in the store and names them."""
        if not record.volumes:
            return config
        layers = {volume.image_id: self._layers(volume) for volume in record.volumes}
        async with self.locks.hold(record.pod_id):
            pod = self.store.pods.get(record.pod_id)
            if pod is None or pod.state is not PodState.READY:
                msg = f"pod sandbox {record.pod_id[:SHORT]} was stopped while the container was being made"
                raise WrongState(msg)
            return await asyncio.to_thread(self._mount, record, layers, config, context)

    async def release(self, record: ContainerRecord) -> None:
        """After the record of a container is gone: what no other container of its pod has is unmounted."""
        if record.volumes:
            await self.release_unused(record.pod_id)
            await self.collector.drop_unused(layer for volume in record.volumes for layer in volume.layers)

    async def release_unused(self, pod_id: PodId) -> None:
        """Unmount what no container's record names, whoever mounted it."""
        async with self.locks.hold(pod_id):
            containers = (record for record in self.store.containers.values() if record.pod_id == pod_id)
            used = {volume.image_id for record in containers for volume in record.volumes}
            await asyncio.to_thread(image_volumes.release, self.layout, pod_id, used)

    def _find(self, mount: pb.Mount) -> ImageVolume:
        wanted = mount.image.image
        found = find_images(self.store.images.values(), wanted)
        if not found:
            msg = f"image {wanted!r} of {mount.container_path} is not on this node"
            raise ImageNotHere(msg, hint="pull it first")
        image = next((image for image in found if image.layers), None)
        if image is None:
            msg = f"image {wanted!r} of {mount.container_path} has no files: it is a Wasm artifact, or empty"
            raise ImageVolumeMountFailed(msg)
        return ImageVolume(image.id, image.layers)

    def _layers(self, volume: ImageVolume) -> list[LayerRecord]:
        found = [self.store.layers.get(key) for key in volume.layers]
        layers = [layer for layer in found if layer is not None]
        if len(layers) < len(found):
            msg = f"a layer of image {volume.image_id} is not on this node"
            raise ImageVolumeMountFailed(msg, hint="remove the image and pull it again")
        return layers

    def _mount(
        self,
        record: ContainerRecord,
        layers: dict[ImageId, list[LayerRecord]],
        config: pb.ContainerConfig,
        context: PodContext,
    ) -> pb.ContainerConfig:
        placed = pb.ContainerConfig()
        placed.CopyFrom(config)
        for mount, volume in zip(image_mounts(placed), record.volumes, strict=True):
            try:
                of_image = layers[volume.image_id]
                root = image_volumes.mount(self.layout, context, volume.image_id, of_image)
            except OSError as error:
                msg = f"image {mount.image.image!r} of {mount.container_path}: {error}"
                raise ImageVolumeMountFailed(msg) from error
            mount.host_path = image_volumes.resolve(root, mount.image_sub_path) if mount.image_sub_path else str(root)
        return placed


def image_mounts(config: pb.ContainerConfig) -> Iterator[pb.Mount]:
    """The mounts of a request that are image volumes, in its order."""
    return (mount for mount in config.mounts if mount.HasField("image"))


def with_image_refs(config: pb.ContainerConfig, volumes: Sequence[ImageVolume]) -> list[pb.Mount]:
    """The mounts as status shows them: as in the request, and which image each image volume was."""
    shown = pb.ContainerConfig(mounts=config.mounts)
    for mount, volume in zip(image_mounts(shown), volumes, strict=True):
        mount.image.image_ref = volume.image_id
    return list(shown.mounts)
