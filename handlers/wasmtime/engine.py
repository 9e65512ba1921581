"""The engine's settings, shared by the compiler and every guest, and the key of what they produce.

Importing this module loads the engine's library (4 MiB, 60 ms): only functions import it, when the first module comes.
Invariant: a compiled module is only ever loaded into an engine made here, by the version and on the CPU of its key.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import wasmtime

from handlers.wasmtime.c_interface import quick_function

MAX_STACK: Final = 1 << 20
"""Bytes of Wasm stack. Must be well below the stack of a guest's thread, or deep recursion is a crash of the daemon."""

_SETTINGS: Final[dict[str, bool | int]] = {
    "epoch_interruption": True,  # how a computing guest is stopped
    "max_wasm_stack": MAX_STACK,
    "wasm_multi_memory": False,  # the memory limit holds for each memory: there must be one
    "wasm_threads": False,  # shared memories escape the limit
    "shared_memory": False,
    "concurrency_support": False,  # of components; with it 50.0.1 loses a call that lends two resources to the host
}
# Not the attributes of the class: it has not all of them, and takes others without a word.
_SETTERS: Final = tuple(
    (
        quick_function(
            f"wasmtime_config_{name}_set",
            None,
            ctypes.c_void_p,
            ctypes.c_bool if isinstance(value, bool) else ctypes.c_size_t,
        ),
        value,
    )
    for name, value in _SETTINGS.items()
)


def new_engine() -> wasmtime.Engine:
    """An engine of one's own: 14 µs, and only with an own one can a single guest be interrupted."""
    config = wasmtime.Config()
    for set_to, value in _SETTERS:
        set_to(config.ptr(), value)
    return wasmtime.Engine(config)


def new_linker(engine: wasmtime.Engine) -> wasmtime.Linker:
    """With WASI preview 1, whose functions can be put others in the place of."""
    linker = wasmtime.Linker(engine)
    linker.allow_shadowing = True
    linker.define_wasi()
    return linker


@dataclass(frozen=True, slots=True)
class Made:
    """What one guest runs in, and nobody else."""

    engine: wasmtime.Engine
    linker: Callable[[wasmtime.Engine], wasmtime.Linker] = new_linker


def make() -> Made:
    """For a guest that begins with nothing."""
    return Made(new_engine())


def engine_key() -> str:
    """Names the engine's version, the settings, the CPU, and what is put into modules: a directory name."""
    import importlib.metadata  # noqa: PLC0415  a worker, which has no need of it, goes without its 2 MiB

    from cri_shim.wire.wasm_growth import VERSION  # noqa: PLC0415  likewise

    facts = repr((sorted(_SETTINGS.items()), _cpu_features(), VERSION)).encode()
    version = importlib.metadata.version("wasmtime")
    return f"wasmtime-{version}-{platform.machine()}-{hashlib.sha256(facts).hexdigest()[:16]}"


def _cpu_features() -> str:
    """Of the first CPU, as the kernel names them; code is compiled for what this CPU has."""
    with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return ""
