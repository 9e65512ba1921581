"""Functions of the engine's C interface by their names, and what callbacks of ours give back to it.

Below the engine's Python classes: addresses are numbers. Invariant: a function here is an object of its own, so that
its types are no other caller's.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from wasmtime import _ffi as ffi

_WITH_THE_LOCK: Final = ctypes.PyDLL(ffi.dll._name)  # noqa: SLF001  the file that is loaded already
NO_FINALIZER: Final = ctypes.cast(0, ctypes.CFUNCTYPE(None, ctypes.c_void_p))
"""What a callback is defined with that has nothing to give back."""
ENDED: Final = b"ended"
"""In an error or a trap by which a guest ends that has been told to: nobody reads it."""


def function(name: str, result: Any, *parameters: Any) -> Any:
    """One that lets go of the interpreter's lock for the call."""
    return _typed(ffi.dll[name], result, parameters)


def quick_function(name: str, result: Any, *parameters: Any) -> Any:
    """One that keeps it, for what returns in less than a microsecond, and neither waits nor runs a guest.

    After a call that lets go of the lock another thread may have it: where a hundred guests ask for it, one that makes
    five such calls waits five times for all the others.
    """
    return _typed(_WITH_THE_LOCK[name], result, parameters)


def _typed(found: Any, result: Any, parameters: tuple[Any, ...]) -> Any:
    found.restype, found.argtypes = result, parameters
    return found


def new_error(text: bytes) -> int:
    """An error for a callback to return, whose owner the engine is then."""
    return ctypes.cast(ffi.wasmtime_error_new(text), ctypes.c_void_p).value or 0
