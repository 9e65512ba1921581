"""The engine's functions that values are made of, called with the interpreter's lock held.

The library's own declarations let go of the lock for each call, after which another thread may have it: of functions
that return in less than a microsecond a request has fifty. Only functions that neither wait nor run a guest are here.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_size_t, c_uint32, c_void_p
from typing import Any, Final

from wasmtime import _ffi as ffi

_LIBRARY: Final = ctypes.PyDLL(ffi.dll._name)  # noqa: SLF001  the file that is loaded already


def _function(name: str, result: Any, *parameters: Any) -> Any:
    function = getattr(_LIBRARY, name)
    function.restype, function.argtypes = result, parameters
    return function


name_new: Final = _function("wasm_byte_vec_new", None, c_void_p, c_size_t, c_char_p)
value_new: Final = _function("wasmtime_component_val_new", ctypes.POINTER(ffi.wasmtime_component_val_t), c_void_p)
value_delete: Final = _function("wasmtime_component_val_delete", None, c_void_p)
list_new: Final = _function("wasmtime_component_vallist_new_uninit", None, c_void_p, c_size_t)
host_new: Final = _function("wasmtime_component_resource_host_new", c_void_p, c_bool, c_uint32, c_uint32)
host_number: Final = _function("wasmtime_component_resource_host_rep", c_uint32, c_void_p)
host_delete: Final = _function("wasmtime_component_resource_host_delete", None, c_void_p)
host_to_any: Final = _function("wasmtime_component_resource_host_to_any", c_void_p, c_void_p, c_void_p, c_void_p)
any_to_host: Final = _function("wasmtime_component_resource_any_to_host", c_void_p, c_void_p, c_void_p, c_void_p)
