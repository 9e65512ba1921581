"""The face of the runtime kind `wasmtime`: its options and how to make a handler.

Not the package itself: a worker imports that too, and nothing of the daemon's side.
"""

from __future__ import annotations

import os

from cri_shim.adapters.context import HandlerContext
from cri_shim.model.handler import Handler, Kind
from handlers.wasmtime.handler import WasmtimeHandler
from handlers.wasmtime.options import WasmtimeOptions

OPTIONS = WasmtimeOptions
KIND = Kind.WASM


def make(name: str, options: WasmtimeOptions, context: HandlerContext) -> Handler:
    """Build the handler `name`. Cheap: the engine is loaded when the first module comes."""
    return WasmtimeHandler(name, options, context, os.geteuid())
