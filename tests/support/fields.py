"""Every field of a message by its path, so that a test can go through all of them."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

Path = tuple[FieldDescriptor, ...]
"""From the message itself down to a field that holds no message; a map is such a field."""


def leaves(descriptor: Descriptor, above: Path = ()) -> Iterator[Path]:
    """The paths of all fields that are no messages."""
    for field in descriptor.fields:
        path = (*above, field)
        if field.message_type is None or is_map(field):
            yield path
        else:
            yield from leaves(field.message_type, path)


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def name_of(path: Path) -> str:
    """As an error names it, in a message that `put` has made: `config.mounts[0].propagation`."""
    return ".".join(f"{field.name}[0]" if field.is_repeated and not is_map(field) else field.name for field in path)


def put(message: Message, path: Path, value: object) -> None:
    """Set a field, with a list around the value and messages above it where they are needed."""
    for field in path[:-1]:
        inner = getattr(message, field.name)
        message = inner.add() if field.is_repeated else inner
    last = path[-1]
    if is_map(last):
        getattr(message, last.name)["key"] = value
    elif last.is_repeated:
        getattr(message, last.name).append(value)
    else:
        setattr(message, last.name, value)
