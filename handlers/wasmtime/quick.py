"""Functions of the engine's C interface that are called with the interpreter's lock held.

The library's own declarations let go of the lock for each call, after which another thread may have it: where a hundred
guests ask for it, one that makes five such calls waits five times for all the others. Only for functions that return in
less than a microsecond: they neither wait nor run a guest.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from wasmtime import _ffi as ffi

_LIBRARY: Final = ctypes.PyDLL(ffi.dll._name)  # noqa: SLF001  the file that is loaded already


def function(name: str, result: Any, *parameters: Any) -> Any:
    """A function of the engine, by its name in C. Pointers may be given as `c_void_p`."""
    found = getattr(_LIBRARY, name)
    found.restype, found.argtypes = result, parameters
    return found
