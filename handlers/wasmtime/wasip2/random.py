"""`wasi:random`: the kernel's random numbers, for all that is asked for."""

from __future__ import annotations

import os
from typing import Final

from handlers.wasmtime.wasip2.interface import Interface, Trap
from handlers.wasmtime.wasip2.world import World

_MOST: Final = 1 << 20
"""Bytes in one call."""


def secure(_world: World) -> Interface:
    """`wasi:random/random`."""
    return Interface(functions={"get-random-bytes": _bytes, "get-random-u64": _u64})


def insecure(_world: World) -> Interface:
    """`wasi:random/insecure`."""
    return Interface(functions={"get-insecure-random-bytes": _bytes, "get-insecure-random-u64": _u64})


def insecure_seed(_world: World) -> Interface:
    """`wasi:random/insecure-seed`."""
    return Interface(functions={"insecure-seed": lambda: (_u64(), _u64())})


def _bytes(size: int) -> bytes:
    if size > _MOST:
        msg = f"wasi:random: {size} random bytes at once, of at most {_MOST}"
        raise Trap(msg)
    return os.urandom(size)


def _u64() -> int:
    return int.from_bytes(os.urandom(8), "little")
