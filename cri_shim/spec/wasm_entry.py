"""Which file of an image is likely to be a Wasm module that its containers run, by what the image says of itself.

A guess, for work that is done ahead: containers are dispatched by their own facts (`cri_shim.spec.dispatch`).
Invariant: an ordinary Linux image costs no look at its files.
"""

from __future__ import annotations

from cri_shim.model.entry import EntryPoint, is_named_wasm
from cri_shim.model.errors import InvalidArgument
from cri_shim.model.image import ImageRecord
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.container_request import entry_point
from cri_shim.spec.dispatch import wasm_annotation
from cri_shim.spec.process import process_args


def wasm_entry(image: ImageRecord) -> EntryPoint | None:
    """Where that file is; None for an image that shows no sign of one.

    Without a command in the image the word is empty: containers say it, and if there is one module it will be that.
    """
    config = pb.ContainerConfig()
    try:
        word = process_args(config, image)[0]
    except InvalidArgument:
        return entry_point("", config, image)
    if is_named_wasm(word) or image.platform.is_wasm or wasm_annotation({**image.config.labels, **image.annotations}):
        return entry_point(word, config, image)
    return None
