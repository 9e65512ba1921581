"""What the binary format of Wasm is made of: numbers, types, limits, read one after the other; and numbers written.

Not a validator. Sans-IO. Invariant: reading goes forwards only; past the end is an IndexError, what is not understood a
ValueError. Source: WebAssembly Core Specification 3.0, "Binary Format", Values, Types and Modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

HEADER: Final = 8
"""Bytes before the first section."""
FUNCTION_TYPE: Final = 0x60
"""How a type begins that is of functions; others are of what a GC heap holds."""
_STRUCT_TYPE: Final = 0x5F
_ARRAY_TYPE: Final = 0x5E
_GROUP: Final = 0x4E
_SUBTYPES: Final = frozenset({0x4F, 0x50})
REFERENCES: Final = frozenset({0x63, 0x64})
"""They are followed by a heap type."""
_HAS_MAXIMUM: Final = 1
_IS_64: Final = 4


class Bytes(Protocol):
    """A file that is mapped will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: int, /) -> int: ...

    def find(self, what: bytes, start: int, end: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a memory in pages, of a table in elements. `wide`: its sizes are numbers of 64 bits."""

    minimum: int
    maximum: int | None = None
    wide: bool = False


class Reader:
    """`at`: where the next byte comes from. What there is to read ends at `end`, if not with the data."""

    def __init__(self, data: Bytes, at: int, end: int | None = None) -> None:
        self.data = data
        self.at = at
        self.end = len(data) if end is None else end

    def byte(self) -> int:
        """As it is."""
        if self.at >= self.end:
            raise IndexError(self.at)
        value = self.data[self.at]
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

    def section(self) -> tuple[int, Reader]:
        """Its number, and what reads its content; the next one follows."""
        kind, size = self.byte(), self.number()
        content = Reader(self.data, self.at, self.at + size)
        self.at = content.end
        return kind, content

    def value_type(self) -> int:
        """How it begins."""
        kind = self.byte()
        if kind in REFERENCES:
            self.number()
        return kind

    def limits(self) -> Limits:
        """Shared ones are not understood, nor pages of another size."""
        flags = self.byte()
        if flags & ~(_HAS_MAXIMUM | _IS_64):
            raise ValueError(flags)
        return Limits(self.number(), self.number() if flags & _HAS_MAXIMUM else None, bool(flags & _IS_64))

    def types(self) -> Iterator[int]:
        """How each type of a section of types begins, once it has been read."""
        left = self.number()
        while left:
            left -= 1
            kind = self.byte()
            if kind == _GROUP:
                left += self.number()
                continue
            if kind in _SUBTYPES:
                for _ in range(self.number()):
                    self.number()
                kind = self.byte()
            self._content(kind)
            yield kind

    def _content(self, kind: int) -> None:
        if kind == FUNCTION_TYPE:
            for _ in ("parameters", "results"):
                for _ in range(self.number()):
                    self.value_type()
        elif kind in {_STRUCT_TYPE, _ARRAY_TYPE}:
            for _ in range(self.number() if kind == _STRUCT_TYPE else 1):
                self.value_type()
                self.byte()  # whether it changes
        else:
            raise ValueError(kind)


def leb(value: int) -> bytes:
    """An unsigned number."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed_leb(value: int) -> bytes:
    """A number that may be negative."""
    out = bytearray()
    while not -0x40 <= value < 0x40:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value & 0x7F)
    return bytes(out)


def sized(content: bytes) -> bytes:
    """With its size in front."""
    return leb(len(content)) + content
