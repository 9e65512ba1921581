"""Which kind of image is meant, Linux or Wasm, where one name stands for both: that of the handler that is to run it.

Not dispatch: a container of the other kind still runs where the pod's handler allows it. Invariant: a request that
names no handler means the one of its pod, and without a pod the default one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cri_shim.adapters.store import Table
from cri_shim.flows.handlers import Handlers
from cri_shim.model.errors import InvalidArgument
from cri_shim.model.handler import Kind
from cri_shim.model.ids import PodId
from cri_shim.model.image import ImageRecord
from cri_shim.model.pod import PodRecord
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.pod import pod_name


@dataclass(frozen=True, slots=True)
class ImagePlatforms:
    """The choice between the images of one name."""

    handlers: Handlers
    pods: Table[PodId, PodRecord]

    def of_pull(self, request: pb.PullImageRequest) -> bool:
        """True for Wasm. NotFound for a handler that there is not."""
        return self._is_wasm(request.image.runtime_handler or self._of_pod(request.sandbox_config))

    def pick(self, found: Sequence[ImageRecord], handler: str) -> ImageRecord:
        """Of some images, at least one, the one for a handler, else the first; empty is the default handler."""
        wasm = handler in {"", *self.handlers.rules} and self._is_wasm(handler)
        return next((image for image in found if image.is_wasm == wasm), found[0])

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
