"""Arbitrary CRI requests as hypothesis strategies, made from the descriptors: no message is named here.

Not the tests that send them. A request of these may be sent as root when the caller gives values for every field that
names a thing of the machine. Invariant: such a field gets one of them and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from tests.support.fields import Path, is_map, leaves

M = TypeVar("M", bound=Message)

Pools = Mapping[str, Sequence[object]]
"""Values by the name of a field. A field of that name gets nothing else."""

_WORDS = ("", "a", "a b", "..", "../x", "-", "0", "-1", "%s", "é", "a\nb", "a\0b", "x" * 300, "true", "*", "a=b", "a:b")
_NUMBERS = (0, 1, -1, 2, 7, 100, 1000, 65_535, 65_536, (1 << 31) - 1, -(1 << 31), 1 << 32, (1 << 63) - 1, -(1 << 63))
_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
}
_TYPES = {FieldDescriptor.TYPE_STRING: str, **dict.fromkeys(_INTEGERS, int)}
_OTHERS: Mapping[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: st.sampled_from(_WORDS) | st.text(st.characters(codec="utf-8"), max_size=8),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=8),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
}


@st.composite
def changed(draw: st.DrawFn, message: M, pools: Pools, most: int, leave: AbstractSet[str] = frozenset()) -> M:
    """A copy of a message in which up to `most` fields, at any depth, have got other values; none below `leave`."""
    copy = type(message)()
    copy.CopyFrom(message)
    kind = cast("Descriptor", message.DESCRIPTOR)
    paths = [path for path in leaves(kind) if not leave & {field.name for field in path}]
    if paths:
        for path in draw(st.lists(st.sampled_from(paths), max_size=most)):
            _change(draw, copy, path, pools)
    return copy


def _change(draw: st.DrawFn, message: Any, path: Path, pools: Pools) -> None:
    for field in path[:-1]:
        inner = getattr(message, field.name)
        if field.is_repeated:
            # Mostly another field of an item that is there: a whole item comes about that way.
            inner = inner[-1] if inner and draw(st.integers(0, 3)) else inner.add()
        else:
            inner.SetInParent()
        message = inner
    last = path[-1]
    if is_map(last):
        assert last.message_type is not None
        key, value = (last.message_type.fields_by_name[name] for name in ("key", "value"))
        getattr(message, last.name)[draw(_value(key, pools, last.name))] = draw(_value(value, pools, f"{last.name}="))
    elif last.is_repeated:
        if draw(st.integers(0, 3)) == 0:
            message.ClearField(last.name)
        getattr(message, last.name).extend(draw(st.lists(_value(last, pools, last.name), max_size=3)))
    else:
        setattr(message, last.name, draw(_value(last, pools, last.name)))


def _value(field: FieldDescriptor, pools: Pools, name: str) -> st.SearchStrategy[Any]:
    pool = [value for value in pools.get(name, ()) if isinstance(value, _TYPES.get(field.type, ()))]
    if pool:
        return st.sampled_from(pool)
    if field.enum_type is not None:
        # Rarely one that does not exist: it is refused before anything else is looked at.
        return st.sampled_from([*[value.number for value in field.enum_type.values] * 6, 99])
    if field.type in _INTEGERS:
        least, most = _INTEGERS[field.type]
        usual = [number for number in _NUMBERS if least <= number <= most]
        return st.sampled_from(usual) | st.integers(least, most)
    return _OTHERS[field.type]
