"""Where the instructions of a Wasm function begin and end.

Not what they mean, nor whether they are right: code that the engine has found valid is read. Of several memories and
shared ones it knows nothing, as the engine is to refuse them; nor of legacy exceptions and stack switching. Invariant:
what is not known is a ValueError or an IndexError, never a guess. Source: WebAssembly Core Specification 3.0, "Binary
Format", Instructions; wide arithmetic from its proposal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from cri_shim.wire.wasm_binary import REFERENCES, Reader

MEMORY_GROW: Final = 0x40
_PREFIX: Final = 16
"""Bits of an opcode that follow its prefix."""
TABLE_GROW: Final = 0xFC << _PREFIX | 15
END: Final = 0x0B
_MOST_ALIGNMENT: Final = 0x40
"""From here on the number means that another memory is named."""
_CATCHES: Final = (2, 2, 1, 1)
"""Numbers that each kind of a catch clause has: a tag and a label, or a label."""


def _block(reader: Reader) -> None:
    """The type of a block: empty, a value's, or the number of a function's."""
    at = reader.at
    if reader.number() in REFERENCES and reader.at == at + 1:
        reader.number()


def _labels(reader: Reader) -> None:
    for _ in range(reader.number() + 1):
        reader.number()


def _types(reader: Reader) -> None:
    for _ in range(reader.number()):
        reader.value_type()


def _catches(reader: Reader) -> None:
    for _ in range(reader.number()):
        for _ in range(_CATCHES[reader.byte()]):
            reader.number()


def _place(reader: Reader) -> None:
    """Of a load or store: alignment and offset."""
    alignment = reader.number()
    if alignment >= _MOST_ALIGNMENT:
        raise ValueError(alignment)
    reader.number()


def _bytes(number: int) -> Callable[[Reader], None]:
    def skip(reader: Reader) -> None:
        reader.at += number

    return skip


_READERS: Final[dict[str, Callable[[Reader], object]]] = {
    "n": Reader.number,
    "p": _place,
    "b": _block,
    "l": _labels,
    "t": _types,
    "c": _catches,
    "1": _bytes(1),
    "4": _bytes(4),
    "8": _bytes(8),
    "v": _bytes(16),
}
_Table = dict[int, tuple[Callable[[Reader], object], ...]]


def _table(operands: dict[str, Iterable[int]]) -> _Table:
    """By opcode, what reads its operands; they are given by letters."""
    return {
        opcode: tuple(_READERS[letter] for letter in letters)
        for letters, opcodes in operands.items()
        for opcode in opcodes
    }


_PLAIN: Final = _table(
    {
        "": (0x00, 0x01, 0x05, 0x0A, END, 0x0F, 0x1A, 0x1B, *range(0x45, 0xC5), 0xD1, 0xD3, 0xD4),
        "n": (
            *(0x08, 0x0C, 0x0D, 0x10, 0x12, 0x14, 0x15),
            *(*range(0x20, 0x27), 0x3F, MEMORY_GROW, 0x41, 0x42, 0xD0, 0xD2, 0xD5, 0xD6),
        ),
        "nn": (0x11, 0x13),
        "b": (0x02, 0x03, 0x04),
        "bc": (0x1F,),
        "l": (0x0E,),
        "t": (0x1C,),
        "p": range(0x28, 0x3F),
        "4": (0x43,),
        "8": (0x44,),
    }
)
_PREFIXED: Final[dict[int, _Table]] = {
    0xFB: _table(  # what lives in a GC heap
        {
            "": (15, *range(26, 31)),
            "n": (0, 1, 6, 7, 11, 12, 13, 14, 16, *range(20, 24)),
            "nn": (2, 3, 4, 5, 8, 9, 10, *range(17, 20)),
            "1nnn": (24, 25),
        }
    ),
    0xFC: _table(  # conversions, memories and tables in bulk, wide arithmetic
        {"": (*range(8), *range(19, 23)), "n": (9, 11, 13, 15, 16, 17), "nn": (8, 10, 12, 14)}
    ),
    0xFD: _table(  # vectors
        {
            "": (*range(14, 21), *range(35, 84), *range(94, 276)),
            "p": (*range(12), 92, 93),
            "v": (12, 13),
            "1": range(21, 35),
            "p1": range(84, 92),
        }
    ),
}


def skip_instruction(reader: Reader) -> int:
    """Its opcode; of one with a prefix both, the prefix in front."""
    opcode = reader.byte()
    further = _PREFIXED.get(opcode)
    number = opcode if further is None else reader.number()
    operands = (_PLAIN if further is None else further).get(number)
    if operands is None:
        raise ValueError(opcode, number)
    for read in operands:
        read(reader)
    return opcode if further is None else opcode << _PREFIX | number


def skip_expression(reader: Reader) -> None:
    """A constant one."""
    while skip_instruction(reader) != END:
        pass


def skip_locals(reader: Reader) -> None:
    """What a function's body begins with."""
    for _ in range(reader.number()):
        reader.number()
        reader.value_type()
