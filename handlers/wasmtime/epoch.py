"""Asking a store at each epoch of its engine whether its guest is to go on computing.

Not who decides. Invariant: a store that is watched ends at an epoch only when it is told to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

import wasmtime
from wasmtime import _ffi as ffi

from handlers.wasmtime.c_interface import ENDED, new_error, quick_function

_CONTINUE: Final = 0
"""`WASMTIME_UPDATE_DEADLINE_CONTINUE` (wasmtime/store.h): run on at once."""
_KIND: Final = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.POINTER(ffi.wasmtime_context_t),
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ffi.wasmtime_update_deadline_kind_t),
)
_ask_at_epoch: Final = quick_function(
    "wasmtime_store_epoch_deadline_callback", None, ctypes.c_void_p, _KIND, ctypes.c_void_p, ctypes.c_void_p
)


def callback(goes_on: Callable[[int], bool]) -> Any:
    """A `wasmtime_store_epoch_deadline_callback`. `goes_on` is called in the guest's thread, with its number.

    It must not raise: C cannot take it.
    """

    def at_epoch(_context: Any, number: int, further: Any, kind: Any) -> int:
        if goes_on(number):
            further[0], kind[0] = 1, _CONTINUE
            return 0
        return new_error(ENDED)

    return _KIND(at_epoch)


def watch(store: wasmtime.Store, made: Any, number: int) -> None:
    """Have the store call it at each epoch, from the next one."""
    _ask_at_epoch(store.ptr(), made, number, None)
    store.set_epoch_deadline(1)
