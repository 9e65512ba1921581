"""What no request may hold, whatever it asks for: a value outside of its enum, a NUL in a text.

Not the meaning of any field. Invariant: behind this check an enum has one of its known values (proto3 lets any number
through, and a `match` with a default would take it for something harmless), and a text can be passed to the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cri_shim.model.errors import InvalidArgument

_OF_THE_CLIENT = frozenset({"labels", "annotations", "label_selector"})
"""Kept and given back as they are, never looked at."""


def check(message: Message) -> None:
    """Raise InvalidArgument that names the first such field by its path."""
    fault = next(_faults(message, ""), "")
    if fault:
        raise InvalidArgument(fault)


def _faults(message: Message, prefix: str) -> Iterator[str]:
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if field.name in _OF_THE_CLIENT:
            continue
        if isinstance(value, Mapping):  # what the descriptor says of it costs half a megabyte to read
            texts = (text for pair in value.items() for text in pair if isinstance(text, str))
            yield from (f"{path}: {text[:100]!r} contains a NUL character" for text in texts if "\0" in text)
        elif field.is_repeated:
            for index, item in enumerate(value):
                yield from _faults_of(field, item, f"{path}[{index}]")
        else:
            yield from _faults_of(field, value, path)


def _faults_of(field: FieldDescriptor, value: Any, path: str) -> Iterator[str]:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        yield from _faults(value, f"{path}.")
    elif field.enum_type is not None and value not in field.enum_type.values_by_number:
        yield f"{path}: {value} is not a value of {field.enum_type.name}"
    elif field.type == FieldDescriptor.TYPE_STRING and "\0" in value:
        yield f"{path}: {value[:100]!r} contains a NUL character"
