"""What a core Wasm module keeps data in, and how much there is to say about it: read without a look at its code.

Not a validator: the engine is one, and refuses what is wrong later. Sans-IO, over a buffer of which only the beginnings
of sections and a few small sections are looked at, whatever somebody has made large. Invariant: any bytes have a shape;
where they are not understood it is the one that may use more. Source: WebAssembly Core Specification 3.0, "Binary
Format", Types and Modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol

_HEADER: Final = 8
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
_FUNCTION: Final = 0x60
_REFERENCES: Final = frozenset({0x63, 0x64})
"""They are followed by a heap type."""
_GROUP: Final = 0x4E
_SUBTYPES: Final = frozenset({0x4F, 0x50})
_WITH_MAXIMUM: Final = 1


class Bytes(Protocol):
    """A file that is mapped will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int, /) -> int: ...

    def find(self, what: bytes, start: int, end: int, /) -> int: ...


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
    reader = _Reader(module, _HEADER)
    try:
        for _ in range(_MOST_SECTIONS):
            if reader.at >= len(module):
                return Shape(has_memory, tables, collects, opens_files, description)
            section, size = reader.byte(), reader.number()
            end = reader.at + size
            if section not in _DESCRIBES_NOTHING:
                description += size * _WEIGHTS.get(section, 1)
            if section == _TYPES:
                collects = collects or size > _MOST_TYPES or _has_collected_types(reader)
            elif section == _IMPORTS:
                opens_files = module.find(_OPENS, reader.at, end) >= 0
            elif section == _TABLES:
                tables = _parse_tables(reader)
            elif section == _MEMORIES:
                has_memory = reader.number() > 0
            elif section == _TAGS:
                collects = True
            reader.at = end
    except (IndexError, ValueError):
        pass
    return Shape(tables=tables, description=len(module))


class _Reader:
    def __init__(self, data: Bytes, at: int) -> None:
        self._data = data
        self.at = at

    def byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def number(self) -> int:
        """LEB128; of a signed one only the length is right."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError(shift)

    def value_type(self) -> int:
        kind = self.byte()
        if kind in _REFERENCES:
            self.number()
        return kind


def _has_collected_types(reader: _Reader) -> bool:
    left = reader.number()
    while left:
        left -= 1
        kind = reader.byte()
        if kind == _GROUP:
            left += reader.number()
            continue
        if kind in _SUBTYPES:
            for _ in range(reader.number()):
                reader.number()
            kind = reader.byte()
        if kind != _FUNCTION:
            return True
        for _ in ("parameters", "results"):
            for _ in range(reader.number()):
                reader.value_type()
    return False


def _parse_tables(reader: _Reader) -> tuple[Table, ...]:
    found = []
    number = reader.number()
    if number > _MOST_TABLES:
        raise ValueError(number)
    for _ in range(number):
        if reader.value_type() == 0x40:  # it has an initial value, and how long that is takes more to know
            raise ValueError(0x40)
        flags, minimum = reader.byte(), reader.number()
        found.append(Table(minimum, reader.number() if flags & _WITH_MAXIMUM else None))
    return tuple(found)
