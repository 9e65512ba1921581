"""The D-Bus messages that a scope of systemd needs: a method call out, its answer back.

Not a D-Bus library: no signals, no file descriptors, no types beyond those that are written here. Sans-IO: the socket
is `cri_shim.kernel.systemd`'s. Invariant: a message is laid out as the D-Bus specification says, little-endian, each
value aligned from the start of its message.

Sources: D-Bus specification, "Message protocol" and "Authentication protocol"; org.freedesktop.systemd1(5).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

FIXED: Final = 16
"""Bytes of a message that say how long it is."""
_METHOD_CALL: Final = 1
_RETURN: Final = 2
_ERROR: Final = 3
_PATH: Final = 1
_INTERFACE: Final = 2
_MEMBER: Final = 3
_SIGNATURE: Final = 8
_LARGEST: Final = 1 << 27

_MANAGER: Final = "org.freedesktop.systemd1.Manager"

Property = str | bool | int | bytes | tuple[int, ...]
"""A value of type s, b, t, ay or au."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply to a call; `error` is what the peer said, None when the call succeeded."""

    error: str | None


def authenticate(uid: int) -> bytes:
    """What a client says first; its socket proves it. The answer is a line that begins with OK."""
    return b"\0AUTH EXTERNAL " + str(uid).encode().hex().encode() + b"\r\n"


BEGIN: Final = b"BEGIN\r\n"
"""Messages follow it."""


def start_scope(name: str, properties: Mapping[str, Property]) -> bytes:
    """StartTransientUnit of systemd's manager, for a unit that there is not yet."""
    body = _Writer()
    body.string(name)
    body.string("fail")
    body.properties(properties)
    body.end_array(body.begin_array(8))  # no auxiliary units
    return _call("StartTransientUnit", "ssa(sv)a(sa(sv))", body)


def set_properties(name: str, properties: Mapping[str, Property]) -> bytes:
    """SetUnitProperties, until the unit goes."""
    body = _Writer()
    body.string(name)
    body.number(True)  # not kept on disk
    body.properties(properties)
    return _call("SetUnitProperties", "sba(sv)", body)


def _call(method: str, signature: str, body: _Writer) -> bytes:
    fields = {
        _PATH: ("o", "/org/freedesktop/systemd1"),
        _INTERFACE: ("s", _MANAGER),
        _MEMBER: ("s", method),
        _SIGNATURE: ("g", signature),
    }
    head = _Writer()
    head.data += struct.pack("<cBBBII", b"l", _METHOD_CALL, 0, 1, len(body.data), 1)
    fields_begin = head.begin_array(8)
    for code, (kind, text) in fields.items():
        head.align(8)
        head.data.append(code)
        head.signature(kind)
        if kind == "g":
            head.signature(text)
        else:
            head.string(text)
    head.end_array(fields_begin)
    head.align(8)
    return bytes(head.data + body.data)


def rest_of(fixed: bytes) -> int:
    """How many bytes follow the first `FIXED` ones of a message. ValueError for what is no message."""
    order = _order(fixed)
    body, fields = struct.unpack_from(f"{order}I", fixed, 4)[0], struct.unpack_from(f"{order}I", fixed, 12)[0]
    rest: int = -(-fields // 8) * 8 + body
    if rest > _LARGEST:
        msg = "not a D-Bus message: it claims to be larger than one may be"
        raise ValueError(msg)
    return rest


def parse(message: bytes) -> Answer | None:
    """A whole message; None for one that answers nothing. ValueError for what is no message."""
    order = _order(message)
    if message[1] == _RETURN:
        return Answer(None)
    if message[1] == _ERROR:
        begin = len(message) - struct.unpack_from(f"{order}I", message, 4)[0]
        return Answer(_text_at(message, begin, order) or "no reason given")
    return None


def _text_at(message: bytes, begin: int, order: str) -> str:
    """The text that an error's body begins with; empty when it has none."""
    if len(message) < begin + 4:
        return ""
    length = struct.unpack_from(f"{order}I", message, begin)[0]
    return message[begin + 4 : begin + 4 + length].decode(errors="replace")


def _order(message: bytes) -> str:
    order = {b"l": "<", b"B": ">"}.get(message[:1])
    if order is None or len(message) < FIXED:
        msg = "not a D-Bus message"
        raise ValueError(msg)
    return order


class _Writer:
    """Appends values in the wire format. A body counts from 0 as well: it begins at a multiple of 8."""

    def __init__(self) -> None:
        self.data = bytearray()

    def align(self, to: int) -> None:
        self.data += bytes(-len(self.data) % to)

    def number(self, value: int) -> None:
        self.align(4)
        self.data += struct.pack("<I", value)

    def string(self, text: str) -> None:
        encoded = text.encode()
        self.number(len(encoded))
        self.data += encoded + b"\0"

    def signature(self, text: str) -> None:
        self.data += bytes([len(text)]) + text.encode() + b"\0"

    def begin_array(self, alignment: int) -> tuple[int, int]:
        """Where its length goes, and where its first element begins: the padding between them does not count."""
        self.number(0)
        length_at = len(self.data) - 4
        self.align(alignment)
        return length_at, len(self.data)

    def end_array(self, begun: tuple[int, int]) -> None:
        length_at, begin = begun
        struct.pack_into("<I", self.data, length_at, len(self.data) - begin)

    def properties(self, values: Mapping[str, Property]) -> None:
        """An array of names and values."""
        begun = self.begin_array(8)
        for key, value in values.items():
            self.align(8)
            self.string(key)
            self.variant(value)
        self.end_array(begun)

    def variant(self, value: Property) -> None:
        if isinstance(value, str):
            self.signature("s")
            self.string(value)
        elif isinstance(value, bool):
            self.signature("b")
            self.number(value)
        elif isinstance(value, int):
            self.signature("t")
            self.align(8)
            self.data += struct.pack("<Q", value)
        elif isinstance(value, bytes):
            self.signature("ay")
            self.number(len(value))
            self.data += value
        else:
            self.signature("au")
            begun = self.begin_array(4)
            for number in value:
                self.number(number)
            self.end_array(begun)
