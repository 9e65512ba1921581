"""The function that a Wasm module is given to grow its memory, or a table, by: it notes what was refused.

    (func (param $by i32) (result i32) (local $was i32)
      (if (i32.eq (local.tee $was (memory.grow (local.get $by))) (i32.const -1))
        (then (if (i32.ge_u (i32.sub (i32.const MOST) (memory.size)) (local.get $by))
          (then (global.set $note (BYTES of $by)))))
        (else (if (i64.ge_u (i64.shl (BYTES of $by) (i64.const 1)) (global.get $note))
          (then (global.set $note (i64.const 0))))))
      (local.get $was))

Of a table it has the new elements' value as its first parameter; of what has sizes of 64 bits all is i64. Sans-IO.
Invariant: it returns what the instruction gives, and does nothing else that the module could see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cri_shim.wire.wasm_binary import FUNCTION_TYPE, Limits, leb, signed_leb

_ADDRESS_BITS: Final = 47
"""What is larger no limit refuses, but the machine."""
_PAGE_BITS: Final = 16
_ELEMENT_BITS: Final = 3
_MOST_PAGES: Final = 1 << 16
_MOST_ELEMENTS: Final = (1 << 32) - 1
_IF, _ELSE, _END = b"\x04\x40", b"\x05", b"\x0b"
_LOCAL_GET, _LOCAL_TEE, _GLOBAL_GET, _GLOBAL_SET = b"\x20", b"\x22", b"\x23", b"\x24"
_CALL: Final = b"\x10"
_LONG_SHIFT: Final = b"\x86"


@dataclass(frozen=True, slots=True)
class _Number:
    """A type, and its instructions."""

    type: bytes
    const: bytes
    equal: bytes
    minus: bytes
    at_least: bytes
    as_long: bytes


_SHORT: Final = _Number(b"\x7f", b"\x41", b"\x46", b"\x6b", b"\x4f", as_long=b"\xad")
_LONG: Final = _Number(b"\x7e", b"\x42", b"\x51", b"\x7d", b"\x5a", as_long=b"")
_ZERO: Final = _LONG.const + b"\0"
NOTE: Final = _LONG.type + b"\1" + _ZERO + _END
"""The global: it changes, and is 0 at first."""


@dataclass(frozen=True, slots=True)
class Grower:
    """Its type and its body, as entries of their sections."""

    type: bytes
    body: bytes


def call(function: int) -> bytes:
    """What is put in the place of the instruction."""
    return _CALL + leb(function)


def grows_memory(limits: Limits, note: int) -> Grower:
    """`note`: the number of the global."""
    grow, size = _LOCAL_GET + b"\0\x40\0", b"\x3f\0"
    most = 1 << _ADDRESS_BITS - _PAGE_BITS if limits.wide else _MOST_PAGES
    return _grower(b"", _up_to(most, limits), (grow, size), _PAGE_BITS, note)


def grows_table(table: int, element: bytes, limits: Limits, note: int) -> Grower:
    """`element`: the type of its elements."""
    grow, size = _LOCAL_GET + b"\0" + _LOCAL_GET + b"\1\xfc\x0f" + leb(table), b"\xfc\x10" + leb(table)
    most = 1 << _ADDRESS_BITS - _ELEMENT_BITS if limits.wide else _MOST_ELEMENTS
    return _grower(element, _up_to(most, limits), (grow, size), _ELEMENT_BITS, note)


def _up_to(most: int, limits: Limits) -> Limits:
    return Limits(limits.minimum, most if limits.maximum is None else min(most, limits.maximum), limits.wide)


def _grower(element: bytes, limits: Limits, instructions: tuple[bytes, bytes], unit: int, note: int) -> Grower:
    """`instructions`: what grows it, and what gives its size, in units of so many bits."""
    grow, size = instructions
    number, last = _LONG if limits.wide else _SHORT, len(element) > 0
    by, was = _LOCAL_GET + bytes([last]), bytes([last + 1])
    most = number.const + _signed(limits.maximum or 0, number)
    in_bytes = by + number.as_long + _LONG.const
    get_note, set_note = _GLOBAL_GET + leb(note), _GLOBAL_SET + leb(note)
    refused = most + size + number.minus + by + number.at_least
    refused += _IF + in_bytes + signed_leb(unit) + _LONG_SHIFT + set_note + _END
    given = in_bytes + signed_leb(unit + 1) + _LONG_SHIFT + get_note + _LONG.at_least
    given += _IF + _ZERO + set_note + _END
    code = grow + _LOCAL_TEE + was + number.const + signed_leb(-1) + number.equal
    code += _IF + refused + _ELSE + given + _END + _LOCAL_GET + was + _END
    parameters = element + number.type
    kind = bytes([FUNCTION_TYPE, 1 + last]) + parameters + b"\1" + number.type
    return Grower(kind, b"\1\1" + number.type + code)


def _signed(value: int, number: _Number) -> bytes:
    """As the constant is written that has these bits."""
    return signed_leb(value - (1 << 32) if number is _SHORT and value >= 1 << 31 else value)
