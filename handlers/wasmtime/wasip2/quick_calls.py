"""The engine's functions that values are made of; with the lock kept, as a request has fifty such calls."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_size_t, c_uint32, c_void_p
from typing import Final

from wasmtime import _ffi as ffi

from handlers.wasmtime.c_interface import quick_function

name_new: Final = quick_function("wasm_byte_vec_new", None, c_void_p, c_size_t, c_char_p)
value_new: Final = quick_function("wasmtime_component_val_new", ctypes.POINTER(ffi.wasmtime_component_val_t), c_void_p)
value_delete: Final = quick_function("wasmtime_component_val_delete", None, c_void_p)
list_new: Final = quick_function("wasmtime_component_vallist_new_uninit", None, c_void_p, c_size_t)
host_new: Final = quick_function("wasmtime_component_resource_host_new", c_void_p, c_bool, c_uint32, c_uint32)
host_number: Final = quick_function("wasmtime_component_resource_host_rep", c_uint32, c_void_p)
host_delete: Final = quick_function("wasmtime_component_resource_host_delete", None, c_void_p)
host_to_any: Final = quick_function("wasmtime_component_resource_host_to_any", c_void_p, c_void_p, c_void_p, c_void_p)
any_to_host: Final = quick_function("wasmtime_component_resource_any_to_host", c_void_p, c_void_p, c_void_p, c_void_p)
