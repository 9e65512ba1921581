"""Which kind of image is meant, Linux or Wasm, where one name stands for both: that of the handler that is to run it.

Not dispatch: a container of the other kind still runs where the pod's handler allows it. Invariant: a request that
names no handler means the one of its pod, and without a pod the default one; what a container runs does not depend on
which of both was pulled before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cri_shim.adapters.content import Content
from cri_shim.adapters.store import Table
from cri_shim.flows.handlers import Handlers
from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.handler import Kind
from cri_shim.model.ids import ImageId, PodId
from cri_shim.model.image import ImageRecord, Platform
from cri_shim.model.pod import PodRecord
from cri_shim.model.refs import parse_reference
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.dispatch import HANDLER_ANNOTATION, HandlerRules, wasm_annotation
from cri_shim.spec.pod import current_config, pod_name
from cri_shim.wire.oci_image import Index, choose, parse_document, platform_of


@dataclass(frozen=True, slots=True)
class ImagePlatforms:
    """The choice between the images of one name. `host`: the Linux platforms of this machine."""

    handlers: Handlers
    pods: Table[PodId, PodRecord]
    images: Table[ImageId, ImageRecord]
    content: Content
    host: Sequence[Platform]

    def of_pull(self, request: pb.PullImageRequest) -> bool:
        """True for Wasm. NotFound for a handler that there is not."""
        return self._is_wasm(request.image.runtime_handler or self._of_pod(request.sandbox_config))

    def of_container(self, found: Sequence[ImageRecord], pod: PodRecord, config: pb.ContainerConfig) -> ImageRecord:
        """Of some images, at least one, and what else there is of their name, the one that the container means."""
        # The kubelet asks by id, which it has by the name: there may be one of the other platform under it.
        tags = _tags(found[0], config.image)
        named = [image for image in self.images.values() if not tags.isdisjoint(image.repo_tags)]
        wasm = self._meant(pod, config).kind is Kind.WASM
        return next((image for image in (*found, *named) if image.is_wasm == wasm), found[0])

    async def require(self, image: ImageRecord, pod: PodRecord, config: pb.ContainerConfig) -> None:
        """FailedPrecondition when the index of the image has one of the other kind, which is the one that is meant."""
        rules = self._meant(pod, config)
        wasm = rules.kind is Kind.WASM
        name = _name(image, config.image)
        if image.is_wasm == wasm or name is None or image.index is None or not self.content.has(image.index):
            return
        index = parse_document(await self.content.read(image.index), "")
        meant = platform_of(choose(index, self.host, wants_wasm=wasm)) if isinstance(index, Index) else image.platform
        if meant.is_wasm != wasm:
            return
        msg = (
            f"image {name} is here for {image.platform.text} only, and handler {rules.name!r} runs it for {meant.text}"
        )
        pull = (
            f"pull that: cri-shim images pull --handler {rules.name} {name}, or crictl pull --pod-config of such a pod"
        )
        annotation = f"{HANDLER_ANNOTATION}{config.metadata.name}"
        raise FailedPrecondition(msg, hint=f"{pull}; or name a handler for what is here in the annotation {annotation}")

    def pick(self, found: Sequence[ImageRecord], handler: str) -> ImageRecord:
        """Of some images, at least one, the one for a handler, else the first; empty is the default handler."""
        wasm = handler in {"", *self.handlers.rules} and self._is_wasm(handler)
        return next((image for image in found if image.is_wasm == wasm), found[0])

    def _meant(self, pod: PodRecord, config: pb.ContainerConfig) -> HandlerRules:
        """The handler whose kind of image the container means; what it is dispatched to, its files decide."""
        key = HANDLER_ANNOTATION + config.metadata.name
        forced = config.annotations.get(key) or current_config(pod).annotations.get(key, "")
        rules = self.handlers.rules.get(forced) or self.handlers.for_pod(pod.handler)
        if rules.kind is Kind.LINUX and wasm_annotation(config.annotations):
            return next((other for other in self.handlers.rules.values() if other.kind is Kind.WASM), rules)
        return rules

    def _of_pod(self, config: pb.PodSandboxConfig) -> str:
        """The handler of a pod that is here; empty for one that is not."""
        try:
            name = pod_name(config)
        except InvalidArgument:
            return ""
        pods = [pod for pod in self.pods.values() if pod.name == name]
        return next((pod.handler for pod in pods if pod.handler in self.handlers.rules), "")

    def _is_wasm(self, handler: str) -> bool:
        return self.handlers.for_pod(handler).kind is Kind.WASM


def _name(image: ImageRecord, wanted: pb.ImageSpec) -> str | None:
    """The name that is meant; None when it may be one that stands for this image alone, not for its index."""
    names = _tags(image, wanted)
    of_index = {digest.removesuffix(f"@{image.index}") for digest in image.repo_digests}
    return min(names, default=None) if all(parse_reference(name).name in of_index for name in names) else None


def _tags(image: ImageRecord, wanted: pb.ImageSpec) -> set[str]:
    """The tag of an image that is asked for; all of them when only its id is."""
    tags = set(image.repo_tags)
    return tags & {_tag(wanted.image), _tag(wanted.user_specified_image)} or tags


def _tag(text: str) -> str | None:
    """A name in full; None for an id, or what has a digest."""
    try:
        return parse_reference(text).repo_tag
    except InvalidArgument:
        return None
