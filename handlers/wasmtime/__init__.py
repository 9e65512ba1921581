"""Wasm modules by wasmtime, in threads of the daemon or in processes of their own.

A folder per runtime kind: `OPTIONS` and `make` are its face.
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
