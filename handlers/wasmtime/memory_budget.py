"""How a memory limit is shared out among the places where a module in the daemon keeps data. A pure function.

The engine limits each memory and each GC heap by one number, and the elements of each table by another; the container's
limit is for the sum. Invariant: whatever the module does, all of them together stay within it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cri_shim.wire.wasm_shape import Shape

_ELEMENT: Final = 8
"""Bytes of a table's element: a function reference; others are smaller."""
_FOR_TABLES: Final = 16
"""One part in so many is for tables that may grow."""
_UNLIMITED_ELEMENTS: Final = 10_000_000
_OUR_ELEMENTS: Final = 64
"""What `handlers.wasmtime.forward` needs."""


@dataclass(frozen=True, slots=True)
class Budget:
    """`memory`: bytes of the memory, and as many of the GC heap if there is one; -1 = no limit but the engine's.

    `elements`: of each table.
    """

    memory: int
    elements: int


def budget(limit: int, shape: Shape) -> Budget:
    """`limit` in bytes, 0 = none."""
    if not limit:
        return Budget(-1, _UNLIMITED_ELEMENTS)
    tables = shape.tables
    needed = max((table.minimum for table in tables), default=0)
    elements = min(max(needed, limit // _FOR_TABLES // _ELEMENT // max(1, len(tables))), limit // _ELEMENT)
    sizes = (elements if table.maximum is None else min(table.maximum, elements) for table in tables)
    rest = max(0, limit - _ELEMENT * sum(sizes))
    places = max(1, shape.has_memory + shape.collects)
    return Budget(rest // places, max(elements, _OUR_ELEMENTS))
