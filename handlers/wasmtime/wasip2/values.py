"""Component values in Python, both ways.

| WIT | Python |
|---|---|
| bool, integers, floats, char, string | bool, int, float, str |
| `list<u8>`, other lists, tuples | bytes, list, tuple |
| record | dict, names as in WIT |
| variant | (case, payload or None) |
| enum | str |
| option | None or the value |
| flags | frozenset of str |
| result | ("ok", value) or ("err", value) |
| own, borrow | the `Resource`; one that is owned leaves or enters the table |

Below the engine's Python classes, which take 50 times as long for a list of bytes. How a value is converted follows
from its type, which the component brings: a `Codec` is made of it once. Invariant: the engine frees what it gave; what
is made here belongs to it as soon as it is complete.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from wasmtime import WasmtimeError, component
from wasmtime import _ffi as ffi

from handlers.wasmtime.wasip2 import quick_calls as quick
from handlers.wasmtime.wasip2.resources import Resource, Table

_VALUE: Final[Any] = ffi.wasmtime_component_val_t
_ANY: Final[Any] = ctypes.POINTER(ffi.wasmtime_component_resource_any_t)
_NAME: Final[Any] = ffi.wasm_name_t
_SIZE: Final = ctypes.sizeof(_VALUE)
_CONTENT: Final[int] = _VALUE.of.offset
_U8: Final[int] = ffi.WASMTIME_COMPONENT_U8.value
_U8_KIND: Final = bytes([_U8])
_RESOURCE: Final[int] = ffi.WASMTIME_COMPONENT_RESOURCE.value


@dataclass(slots=True)
class Context:
    """Whose values they are. `pointer`: the engine's store context, good for one call."""

    pointer: Any
    table: Table


@dataclass(frozen=True, slots=True)
class Codec:
    """`lift(context, value)` is the value in Python; `lower(context, object, value)` stores it."""

    lift: Callable[[Context, Any], Any]
    lower: Callable[[Context, Any, Any], None]


def codec(wit: component.ValType) -> Codec:
    """For one type. TypeError for what WASI 0.2 has not: streams, futures."""
    name = _PRIMITIVES.get(type(wit))
    if name is not None:
        return _primitive(*name)
    make = _COMPOUNDS.get(type(wit))
    if make is None:
        msg = f"no values of the type {type(wit).__name__}"
        raise TypeError(msg)
    return make(wit)


def _primitive(field: str, kind: int) -> Codec:
    def lift(_context: Context, value: Any) -> Any:
        return getattr(value.of, field)

    def lower(_context: Context, thing: Any, value: Any) -> None:
        value.kind = kind
        setattr(value.of, field, thing)

    return Codec(lift, lower)


_PRIMITIVES: Final[dict[type, tuple[str, int]]] = {
    component.Bool: ("boolean", ffi.WASMTIME_COMPONENT_BOOL.value),
    component.S8: ("s8", ffi.WASMTIME_COMPONENT_S8.value),
    component.U8: ("u8", _U8),
    component.S16: ("s16", ffi.WASMTIME_COMPONENT_S16.value),
    component.U16: ("u16", ffi.WASMTIME_COMPONENT_U16.value),
    component.S32: ("s32", ffi.WASMTIME_COMPONENT_S32.value),
    component.U32: ("u32", ffi.WASMTIME_COMPONENT_U32.value),
    component.S64: ("s64", ffi.WASMTIME_COMPONENT_S64.value),
    component.U64: ("u64", ffi.WASMTIME_COMPONENT_U64.value),
    component.F32: ("f32", ffi.WASMTIME_COMPONENT_F32.value),
    component.F64: ("f64", ffi.WASMTIME_COMPONENT_F64.value),
}


def _char(_wit: Any) -> Codec:
    def lower(_context: Context, thing: str, value: Any) -> None:
        value.kind = ffi.WASMTIME_COMPONENT_CHAR.value
        value.of.character = ord(thing)

    return Codec(lambda _context, value: chr(value.of.character), lower)


def _string(_wit: Any) -> Codec:
    def lower(_context: Context, thing: str, value: Any) -> None:
        value.kind = ffi.WASMTIME_COMPONENT_STRING.value
        value.of.string = _name(thing)

    return Codec(lambda _context, value: _text(value.of.string), lower)


def _enum(_wit: Any) -> Codec:
    def lower(_context: Context, thing: str, value: Any) -> None:
        value.kind = ffi.WASMTIME_COMPONENT_ENUM.value
        value.of.enumeration = _name(thing)

    return Codec(lambda _context, value: _text(value.of.enumeration), lower)


def _flags(_wit: Any) -> Codec:
    def lift(_context: Context, value: Any) -> frozenset[str]:
        flags = value.of.flags
        return frozenset(_text(flags.data[index]) for index in range(flags.size))

    def lower(_context: Context, thing: frozenset[str], value: Any) -> None:
        value.kind = ffi.WASMTIME_COMPONENT_FLAGS.value
        ffi.wasmtime_component_valflags_new_uninit(ctypes.byref(value.of.flags), len(thing))
        for index, flag in enumerate(thing):
            value.of.flags.data[index] = _name(flag)

    return Codec(lift, lower)


def _list(wit: Any) -> Codec:
    if isinstance(wit.element, component.U8):
        return Codec(_lift_bytes, _lower_bytes)
    element = codec(wit.element)

    def lift(context: Context, value: Any) -> list[Any]:
        items = value.of.list
        return [element.lift(context, items.data[index]) for index in range(items.size)]

    def lower(context: Context, thing: Sequence[Any], value: Any) -> None:
        value.kind = ffi.WASMTIME_COMPONENT_LIST.value
        quick.list_new(ctypes.byref(value.of.list), len(thing))
        for index, item in enumerate(thing):
            element.lower(context, item, value.of.list.data[index])

    return Codec(lift, lower)


def _lift_bytes(_context: Context, value: Any) -> bytes:
    size = value.of.list.size
    return ctypes.string_at(value.of.list.data, size * _SIZE)[_CONTENT::_SIZE] if size else b""


def _lower_bytes(_context: Context, thing: bytes, value: Any) -> None:
    value.kind = ffi.WASMTIME_COMPONENT_LIST.value
    quick.list_new(ctypes.byref(value.of.list), len(thing))
    if thing:
        # Of all that can be assigned to with a step, a bytearray is by far the fastest.
        room = bytearray(len(thing) * _SIZE)
        room[::_SIZE] = _U8_KIND * len(thing)
        room[_CONTENT::_SIZE] = thing
        ctypes.memmove(value.of.list.data, (ctypes.c_char * len(room)).from_buffer(room), len(room))


def _tuple(wit: Any) -> Codec:
    elements = [codec(element) for element in wit.elements]

    def lift(context: Context, value: Any) -> tuple[Any, ...]:
        items = value.of.tuple.data
        return tuple(element.lift(context, items[index]) for index, element in enumerate(elements))

    def lower(context: Context, thing: Sequence[Any], value: Any) -> None:
        value.kind = ffi.WASMTIME_COMPONENT_TUPLE.value
        ffi.wasmtime_component_valtuple_new_uninit(ctypes.byref(value.of.tuple), len(elements))
        for index, (element, item) in enumerate(zip(elements, thing, strict=True)):
            element.lower(context, item, value.of.tuple.data[index])

    return Codec(lift, lower)


def _record(wit: Any) -> Codec:
    fields = [(name, codec(field)) for name, field in wit.fields]

    def lift(context: Context, value: Any) -> dict[str, Any]:
        items = value.of.record.data
        return {name: field.lift(context, items[index].val) for index, (name, field) in enumerate(fields)}

    def lower(context: Context, thing: dict[str, Any], value: Any) -> None:
        value.kind = ffi.WASMTIME_COMPONENT_RECORD.value
        ffi.wasmtime_component_valrecord_new_uninit(ctypes.byref(value.of.record), len(fields))
        for index, (name, field) in enumerate(fields):
            value.of.record.data[index].name = _name(name)
            field.lower(context, thing[name], value.of.record.data[index].val)

    return Codec(lift, lower)


def _variant(wit: Any) -> Codec:
    cases = {name: codec(payload) if payload is not None else None for name, payload in wit.cases}

    def lift(context: Context, value: Any) -> tuple[str, Any]:
        name = _text(value.of.variant.discriminant)
        return name, _lift_boxed(context, cases[name], value.of.variant.val)

    def lower(context: Context, thing: tuple[str, Any], value: Any) -> None:
        name, payload = thing
        value.kind = ffi.WASMTIME_COMPONENT_VARIANT.value
        value.of.variant.val = _boxed(context, cases[name], payload)
        value.of.variant.discriminant = _name(name)

    return Codec(lift, lower)


def _result(wit: Any) -> Codec:
    ok, err = (codec(payload) if payload is not None else None for payload in (wit.ok, wit.err))

    def lift(context: Context, value: Any) -> tuple[str, Any]:
        result = value.of.result
        if result.is_ok:
            return "ok", _lift_boxed(context, ok, result.val)
        return "err", _lift_boxed(context, err, result.val)

    def lower(context: Context, thing: tuple[str, Any], value: Any) -> None:
        name, payload = thing
        value.kind = ffi.WASMTIME_COMPONENT_RESULT.value
        value.of.result.val = _boxed(context, ok if name == "ok" else err, payload)
        value.of.result.is_ok = name == "ok"

    return Codec(lift, lower)


def _option(wit: Any) -> Codec:
    payload = codec(wit.payload)

    def lift(context: Context, value: Any) -> Any:
        return payload.lift(context, value.of.option.contents) if value.of.option else None

    def lower(context: Context, thing: Any, value: Any) -> None:
        value.kind = ffi.WASMTIME_COMPONENT_OPTION.value
        value.of.option = _boxed(context, payload, thing) if thing is not None else None

    return Codec(lift, lower)


def _lift_boxed(context: Context, payload: Codec | None, pointer: Any) -> Any:
    return payload.lift(context, pointer.contents) if payload is not None else None


def _boxed(context: Context, payload: Codec | None, thing: Any) -> Any:
    if payload is None:
        return None
    value = _VALUE()
    payload.lower(context, thing, value)
    return quick.value_new(ctypes.byref(value))


def _lift_own(context: Context, value: Any) -> Resource:
    return context.table.take(_number(context, value))


def _lift_borrow(context: Context, value: Any) -> Resource:
    return context.table.get(_number(context, value))


def _number(context: Context, value: Any) -> int:
    host = ctypes.c_void_p()
    _check(quick.any_to_host(context.pointer, value.of.resource, ctypes.byref(host)))
    number: int = quick.host_number(host)
    quick.host_delete(host)
    return number


def _lower_own(context: Context, thing: Resource, value: Any) -> None:
    host = quick.host_new(True, context.table.add(thing), thing.TYPE)
    handle = _ANY()
    error = quick.host_to_any(context.pointer, host, ctypes.byref(handle))
    quick.host_delete(host)
    _check(error)
    value.kind = _RESOURCE
    value.of.resource = handle


def _check(error: int | None) -> None:
    if error:
        pointer = ctypes.cast(error, ctypes.POINTER(ffi.wasmtime_error_t))
        raise WasmtimeError._from_ptr(pointer)  # noqa: SLF001  as the library's own classes do


def _name(text: str) -> Any:
    name, content = _NAME(), text.encode()
    quick.name_new(ctypes.byref(name), len(content), content)
    return name


def _text(name: Any) -> str:
    return ctypes.string_at(name.data, name.size).decode() if name.size else ""


_COMPOUNDS: Final[dict[type, Callable[[Any], Codec]]] = {
    component.Char: _char,
    component.String: _string,
    component.EnumType: _enum,
    component.FlagsType: _flags,
    component.ListType: _list,
    component.TupleType: _tuple,
    component.RecordType: _record,
    component.VariantType: _variant,
    component.ResultType: _result,
    component.OptionType: _option,
    component.OwnType: lambda _wit: Codec(_lift_own, _lower_own),
    component.BorrowType: lambda _wit: Codec(_lift_borrow, _lower_own),
}
