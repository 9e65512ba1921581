"""ExplainImage of the admin service: the decision that a container of an image would meet, before there is one.

The same facts, put to the same rules (`cri_shim.spec.dispatch`), without a pod. Invariant: nothing is made.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cri_shim.adapters import rootfs
from cri_shim.adapters.store import Store
from cri_shim.flows.handlers import Handlers
from cri_shim.model.errors import CriShimError, FailedPrecondition, NotFound
from cri_shim.model.handler import Kind
from cri_shim.model.image import ImageRecord
from cri_shim.model.layout import Layout
from cri_shim.model.refs import find_images
from cri_shim.pb import admin_pb2, api_pb2
from cri_shim.spec import container_request as spec
from cri_shim.spec import dispatch
from cri_shim.spec.process import process_args


@dataclass(frozen=True, slots=True)
class ExplainImage:
    """The RPC."""

    store: Store
    layout: Layout
    handlers: Handlers

    async def __call__(self, request: admin_pb2.ExplainImageRequest) -> admin_pb2.ExplainImageResponse:
        """The facts, and the decision or why there is none. NotFound without the image or the pod's handler."""
        rules = self.handlers.for_pod(request.runtime_handler)
        image = self._image(request.image, wasm=rules.kind is Kind.WASM)
        answer = admin_pb2.ExplainImageResponse(
            image_id=image.id, platform=image.platform.text, artifact=image.wasm is not None, pod_handler=rules.name
        )
        config = api_pb2.ContainerConfig(
            metadata=api_pb2.ContainerMetadata(name=request.container), command=request.command
        )
        pod = api_pb2.PodSandboxConfig(annotations=request.annotations)
        try:
            command = process_args(config, image)
            answer.command.extend(command)
            layers = [layer for key in image.layers if (layer := self.store.layers.get(key)) is not None]
            entry = spec.entry_point(command[0], config, image)
            kind = await asyncio.to_thread(rootfs.kind_of_entry, self.layout, layers, entry)
            answer.entrypoint = kind.value
            decision = dispatch.decide(self.handlers.rules, rules, spec.subject(config, pod, image, kind))
        except (CriShimError, OSError) as error:
            answer.refusal = str(error)
        else:
            answer.handler, answer.reason = decision.handler, decision.reason
        return answer

    def _image(self, text: str, *, wasm: bool) -> ImageRecord:
        found = find_images(self.store.images.values(), text)
        if not found:
            msg = f"image {text!r} is not on this node"
            raise NotFound(msg, hint="pull it first")
        image = next((image for image in found if image.platform.is_wasm == wasm), found[0])
        if any(self.store.layers.get(key) is None for key in image.layers):
            msg = f"a layer of image {text!r} is not on this node"
            raise FailedPrecondition(msg, hint="run cri-shim images check")
        return image
