"""What a core Wasm module keeps data in, and how much there is to say about it: read without a look at its code.

Not a validator: the engine is one, and refuses what is wrong later. Sans-IO, over a buffer of which only the beginnings
of sections and a few small sections are looked at, whatever somebody has made large. Invariant: any bytes have a shape;
where they are not understood it is the one that may use more. Source: WebAssembly Core Specification 3.0, "Binary
Format", Types and Modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cri_shim.wire.wasm_binary import FUNCTION_TYPE, HEADER, Bytes, Reader

_CUSTOM, _TYPES, _IMPORTS, _TABLES, _MEMORIES, _EXPORTS, _CODE, _DATA, _TAGS = 0, 1, 2, 4, 5, 7, 10, 11, 13
_DESCRIBES_NOTHING: Final = frozenset({_CUSTOM, _CODE, _DATA})
_WEIGHTS: Final = {_TYPES: 8, _EXPORTS: 8}
"""A byte of these takes the engine so many times as much memory as one of other sections."""
_MOST_SECTIONS: Final = 1000
_MOST_TYPES: Final = 1 << 15
"""Bytes of types that are looked at."""
_MOST_TABLES: Final = 100
"""The engine's own limit."""
_OPENS: Final = b"path_open"


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers of elements."""

    minimum: int
    maximum: int | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """`collects`: it has types, or exceptions, that live in a GC heap. `opens_files`: it imports what can.

    `description`: bytes of what is neither code nor data (types, imports, exports, …), by what they weigh.
    """

    has_memory: bool = True
    tables: tuple[Table, ...] = ()
    collects: bool = True
    opens_files: bool = True
    description: int = field(default=0, compare=False)


UNKNOWN: Final = Shape()


def parse_shape(module: Bytes) -> Shape:
    """Of a module in the binary format."""
    has_memory, tables, collects, opens_files, description = False, tuple[Table, ...](), False, False, 0
    reader = Reader(module, HEADER)
    try:
        for _ in range(_MOST_SECTIONS):
            if reader.at >= len(module):
                return Shape(has_memory, tables, collects, opens_files, description)
            section, content = reader.section()
            size = content.end - content.at
            if section not in _DESCRIBES_NOTHING:
                description += size * _WEIGHTS.get(section, 1)
            if section == _TYPES:
                collects = collects or size > _MOST_TYPES or _has_collected_types(content)
            elif section == _IMPORTS:
                opens_files = module.find(_OPENS, content.at, content.end) >= 0
            elif section == _TABLES:
                tables = _parse_tables(content)
            elif section == _MEMORIES:
                has_memory = content.number() > 0
            elif section == _TAGS:
                collects = True
    except (IndexError, ValueError):
        pass
    return Shape(tables=tables, description=len(module))


def _has_collected_types(reader: Reader) -> bool:
    return any(kind != FUNCTION_TYPE for kind in reader.types())


def _parse_tables(reader: Reader) -> tuple[Table, ...]:
    found = []
    number = reader.number()
    if number > _MOST_TABLES:
        raise ValueError(number)
    for _ in range(number):
        if reader.value_type() == 0x40:  # it has an initial value, and how long that is takes more to know
            raise ValueError(0x40)
        limits = reader.limits()
        found.append(Table(limits.minimum, limits.maximum))
    return tuple(found)
