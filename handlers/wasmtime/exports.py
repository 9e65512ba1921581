"""The functions that a module exports.

Not by the library's own list, which makes some objects of Python for each export: a start has to be quick, and whatever
a worker runs or makes it has in memory of its own. Invariant: nothing of the engine's is kept.
"""

from __future__ import annotations

import ctypes
from typing import Any

import wasmtime
from wasmtime import _ffi as ffi


def functions(module: wasmtime.Module) -> dict[str, int]:
    """The number of parameters of each function, by its name."""
    found: dict[str, int] = {}
    exports: Any = ffi.wasm_exporttype_vec_t()
    ffi.wasmtime_module_exports(module.ptr(), ctypes.byref(exports))
    try:
        for index in range(exports.size):
            export = exports.data[index]
            signature: Any = ffi.wasm_externtype_as_functype_const(ffi.wasm_exporttype_type(export))
            if signature:
                name = ffi.wasm_exporttype_name(export).contents
                text = ctypes.string_at(name.data, name.size).decode()
                found[text] = ffi.wasm_functype_params(signature).contents.size
    finally:
        ffi.wasm_exporttype_vec_delete(ctypes.byref(exports))
    return found
