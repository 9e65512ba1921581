"""A core module through the engine's C interface by plain numbers: load, link, look at, instantiate, call.

The library's classes make some objects of Python per step, of types of their own. A worker has a copy of the page of
each that it touches (`handlers.wasmtime.worker`), and a start takes the longer. Here an address is an int, and all that
calls fill in is one block of memory. Not for what is done once in a daemon's life. Invariant: what an address is of
lives as long as it is used: the store outlives it all.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import wasmtime
from wasmtime import _ffi as ffi

from handlers.wasmtime.c_interface import function, quick_function

ADDRESS: Final = ctypes.c_void_p
SIZE: Final = ctypes.c_size_t
TEXT: Final = ctypes.c_char_p
TRUTH: Final = ctypes.c_bool


_deserialize_file: Final = function("wasmtime_module_deserialize_file", ADDRESS, ADDRESS, TEXT, ADDRESS)
_delete_module: Final = function("wasmtime_module_delete", None, ADDRESS)
_instantiate_pre: Final = function("wasmtime_linker_instantiate_pre", ADDRESS, ADDRESS, ADDRESS, ADDRESS)
_delete_pre: Final = function("wasmtime_instance_pre_delete", None, ADDRESS)
_pre_instantiate: Final = function("wasmtime_instance_pre_instantiate", ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
_instantiate: Final = function("wasmtime_linker_instantiate", ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS)
_export_get: Final = quick_function("wasmtime_instance_export_get", TRUTH, ADDRESS, ADDRESS, TEXT, SIZE, ADDRESS)
_call: Final = function("wasmtime_func_call", ADDRESS, ADDRESS, ADDRESS, ADDRESS, SIZE, ADDRESS, SIZE, ADDRESS)
_global_get: Final = quick_function("wasmtime_global_get", None, ADDRESS, ADDRESS, ADDRESS)
_exports: Final = function("wasmtime_module_exports", None, ADDRESS, ADDRESS)
_delete_exports: Final = function("wasm_exporttype_vec_delete", None, ADDRESS)
_export_name: Final = quick_function("wasm_exporttype_name", ADDRESS, ADDRESS)
_export_type: Final = quick_function("wasm_exporttype_type", ADDRESS, ADDRESS)
_as_function: Final = quick_function("wasm_externtype_as_functype_const", ADDRESS, ADDRESS)
_parameters: Final = quick_function("wasm_functype_params", ADDRESS, ADDRESS)

_WORD: Final = 8
"""Bytes; the engine runs on 64-bit machines only."""
_INSTANCE: Final = 1 * _WORD
_ITEM: Final = 3 * _WORD
_FUNCTION: Final = _ITEM + ffi.wasmtime_extern_t.of.offset
"""Where in the block: at first an address that a call returns, or a vector, then an instance, an export, a value."""
_VALUE: Final = _ITEM + 4 * _WORD
_WORDS: Final = 11
_IS_FUNCTION: Final[int] = ffi.WASMTIME_EXTERN_FUNC.value
_IS_GLOBAL: Final[int] = ffi.WASMTIME_EXTERN_GLOBAL.value
_IS_MEMORY: Final[int] = ffi.WASMTIME_EXTERN_MEMORY.value
_MEMORY: Final = b"memory"


def address(pointer: Any) -> int:
    """What a pointer of the library's points to."""
    return ctypes.addressof(pointer.contents)


def error(at: int) -> wasmtime.WasmtimeError:
    """The library's exception for an error of the engine's."""
    found: wasmtime.WasmtimeError = wasmtime.WasmtimeError._from_ptr(  # noqa: SLF001  as the library's own classes do
        ctypes.cast(at, ctypes.POINTER(ffi.wasmtime_error_t))
    )
    return found


def _trap(at: int) -> wasmtime.Trap:
    found: wasmtime.Trap = wasmtime.Trap._from_ptr(  # noqa: SLF001  likewise
        ctypes.cast(at, ctypes.POINTER(ffi.wasm_trap_t))
    )
    return found


class NativeModule:
    """The one module of a store. What fails is a `wasmtime.WasmtimeError`, or a `wasmtime.Trap` of the guest."""

    def __init__(self, engine: wasmtime.Engine, linker: wasmtime.Linker, store: wasmtime.Store) -> None:
        self._held = (engine, linker, store)
        self._engine = address(engine.ptr())
        self._linker = address(linker.ptr())
        self.context = address(store._context())  # noqa: SLF001  the library has no other way
        """The store's, for other functions of the engine's."""
        self._module = self._pre = 0
        self._block = (ctypes.c_uint64 * _WORDS)()
        self._at = ctypes.addressof(self._block)

    def load(self, path: str) -> None:
        """From a file that the engine has compiled."""
        self._check(_deserialize_file(self._engine, path.encode(), self._at))
        self._module = self._block[0]

    def link(self) -> None:
        """With what the linker has. The error says what is missing."""
        self._check(_instantiate_pre(self._linker, self._module, self._at))
        self._pre = self._block[0]

    def functions(self) -> dict[str, int]:
        """The number of parameters of each exported function, by its name."""
        _exports(self._module, self._at)
        found: dict[str, int] = {}
        try:
            for export in _words(self._block[1], self._block[0]):
                signature = _as_function(_export_type(export))
                if signature:
                    size, text = _words(_export_name(export), 2)
                    found[ctypes.string_at(text, size).decode()] = _words(_parameters(signature), 1)[0]
        finally:
            _delete_exports(self._at)
        return found

    def last_export(self) -> str:
        """Its name; empty when there is none."""
        vector = self._at + _VALUE  # elsewhere the instance may be already
        _exports(self._module, vector)
        try:
            number, first = self._block[_VALUE // _WORD : _VALUE // _WORD + 2]
            last = _words(first, number)[-1:]
            size, text = _words(_export_name(last[0]), 2) if last else (0, 0)
            return ctypes.string_at(text, size).decode()
        finally:
            _delete_exports(vector)

    def instantiate(self) -> None:
        """As it was linked."""
        self._block[0] = 0
        self._check(_pre_instantiate(self._pre, self.context, self._at + _INSTANCE, self._at), may_trap=True)

    def instantiate_anew(self) -> None:
        """With what the linker has now."""
        self._block[0] = 0
        self._check(
            _instantiate(self._linker, self.context, self._module, self._at + _INSTANCE, self._at), may_trap=True
        )

    def call(self, name: str) -> None:
        """Run an exported function, which takes no parameters and returns nothing that anybody wants."""
        if not self._find(name.encode(), _IS_FUNCTION):
            raise KeyError(name)
        self._block[0] = 0
        self._check(_call(self.context, self._at + _FUNCTION, None, 0, None, 0, self._at), may_trap=True)

    def memory(self) -> wasmtime.Memory | None:
        """The library's view of what is exported by that name, once it is instantiated."""
        if not self._find(_MEMORY, _IS_MEMORY):
            return None
        item = ffi.wasmtime_extern_t.from_buffer_copy(self._block, _ITEM)
        found: wasmtime.Memory = wasmtime.Memory._from_raw(item.of.memory)  # noqa: SLF001  as above
        return found

    def number(self, name: str) -> int:
        """What an exported global of i64 has now; 0 without an instance."""
        if not self._find(name.encode(), _IS_GLOBAL):
            return 0
        _global_get(self.context, self._at + _FUNCTION, self._at + _VALUE)
        value = ffi.wasmtime_val_t.from_buffer_copy(self._block, _VALUE)
        return int(value.of.i64)

    def _find(self, name: bytes, kind: int) -> bool:
        """Put the export of that name and kind into the block."""
        if not self._block[_INSTANCE // _WORD]:  # the number of its store: there is none yet
            return False
        found: bool = _export_get(self.context, self._at + _INSTANCE, name, len(name), self._at + _ITEM)
        return found and self._block[_ITEM // _WORD] & 0xFF == kind

    def close(self) -> None:
        """Give back what is not the store's. A second call does nothing."""
        module, pre, self._module, self._pre = self._module, self._pre, 0, 0
        if pre:
            _delete_pre(pre)
        if module:
            _delete_module(module)

    def _check(self, failed: int | None, *, may_trap: bool = False) -> None:
        if failed:
            raise error(failed)
        if may_trap and self._block[0]:
            raise _trap(self._block[0])


def _words(at: int, count: int) -> memoryview:
    """A copy of what is there, as numbers."""
    return memoryview(ctypes.string_at(at, count * _WORD)).cast("Q")
