"""Calls between a component and Python: host functions for its linker, and calls of what it exports.

Not the functions. They are bound below the engine's Python classes: see `values`. Invariant: nothing leaves a callback
as an exception; what it means is on the guest, and the engine gets an error that ends it.
"""

from __future__ import annotations

import ctypes
import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import wasmtime
from wasmtime import _ffi as ffi
from wasmtime import component

from handlers.wasmtime.c_interface import ENDED, NO_FINALIZER, new_error
from handlers.wasmtime.sockets import Stopped
from handlers.wasmtime.wasip2 import quick_calls as quick
from handlers.wasmtime.wasip2.interface import Exited, Failure, Function, Trap
from handlers.wasmtime.wasip2.resources import Resource, Table
from handlers.wasmtime.wasip2.values import Codec, Context, codec
from handlers.wasmtime.wasip2.world import World

_bound: Final[dict[int, _Bound]] = {}
_worlds: Final[dict[int, World]] = {}
_numbers: Final = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Signature:
    """How the values of a function are converted."""

    params: tuple[Codec, ...]
    result: Codec | None
    fallible: bool
    """Its result is a `result`."""


def signature_of(kind: component.FuncType) -> Signature:
    """From the type as the component has it."""
    result = kind.result
    return Signature(
        tuple(codec(wit) for _, wit in kind.params),
        codec(result) if result is not None else None,
        isinstance(result, component.ResultType),
    )


@dataclass(slots=True)
class _Bound:
    """A host function of one guest."""

    world: World
    function: Function
    signature: Signature | None = None

    def learn(self, pointer: Any) -> Signature:
        """At the first call."""
        with component.FuncType._from_ptr(pointer, owner=self) as kind:  # noqa: SLF001  it is the callback's
            self.signature = signature_of(kind)
        return self.signature

    def run(self, signature: Signature, context: Context, arguments: Any, results: Any) -> None:
        """Call it. `Failure` is the err of its result."""
        lifted = [param.lift(context, arguments[index]) for index, param in enumerate(signature.params)]
        if not signature.fallible:
            answer = self.function(*lifted)
        else:
            try:
                answer = ("ok", self.function(*lifted))
            except Failure as failure:
                answer = ("err", failure.value)
        if signature.result is not None:
            signature.result.lower(context, answer, results[0])


def _call(number: int, pointer: Any, kind: Any, arguments: Any, _count: int, results: Any, _results: int) -> int:
    """`wasmtime_component_func_callback_t`."""
    bound = _bound[number]
    running = bound.world.running
    try:
        signature = bound.signature or bound.learn(kind)
        bound.run(signature, Context(pointer, running.table), arguments, results)
    except Exited as exited:
        running.instance.leave(exited.code)
        return new_error(ENDED)
    except Stopped:
        return new_error(ENDED)
    except Trap as trap:
        return new_error(str(trap).encode())
    except Exception as error:  # noqa: BLE001  C cannot take it; the guest ends and says so
        running.instance.fail(error)
        return new_error(ENDED)
    return 0


def _drop(number: int, _context: Any, resource: int) -> int:
    """`wasmtime_component_resource_destructor_t`."""
    world = _worlds[number]
    try:
        world.table.drop(resource)
    except Stopped:
        return new_error(ENDED)
    except Trap as trap:
        return new_error(str(trap).encode())
    except Exception as error:  # noqa: BLE001  as above
        world.running.instance.fail(error)
        return new_error(ENDED)
    return 0


_CALL: Final = ffi.wasmtime_component_func_callback_t(_call)
_DROP: Final = ffi.wasmtime_component_resource_destructor_t(_drop)


class Definer:
    """Puts functions and resources of one world on a linker; they work until `resources` are closed."""

    def __init__(self, world: World, resources: ExitStack) -> None:
        self._world = world
        self._resources = resources
        self._number = next(_numbers)
        _worlds[self._number] = world
        resources.callback(_worlds.pop, self._number)

    def function(self, instance: component.LinkerInstance, name: str, function: Function) -> None:
        """Define a function in an instance that the component imports."""
        number = next(_numbers)
        _bound[number] = _Bound(self._world, function)
        self._resources.callback(_bound.pop, number)
        text = name.encode()
        _check(
            ffi.wasmtime_component_linker_instance_add_func(
                instance.ptr(), text, len(text), _CALL, number, NO_FINALIZER
            )
        )

    def resource(self, instance: component.LinkerInstance, name: str, cls: type[Resource]) -> None:
        """Likewise a resource."""
        kind, text = component.ResourceType.host(cls.TYPE), name.encode()
        _check(
            ffi.wasmtime_component_linker_instance_add_resource(
                instance.ptr(), text, len(text), kind.ptr(), _DROP, self._number, NO_FINALIZER
            )
        )


def call(
    table: Table,
    store: wasmtime.Store,
    function: component.Func,
    *arguments: object,
    signature: Signature | None = None,
) -> Any:
    """Call what the component exports, whose `signature` may be known. WasmtimeError when it traps."""
    signature = signature or signature_of(function.type(store))
    context = Context(store._context(), table)  # noqa: SLF001  as the library's own classes do
    params = (ffi.wasmtime_component_val_t * len(arguments))()
    for index, (param, argument) in enumerate(zip(signature.params, arguments, strict=True)):
        param.lower(context, argument, params[index])
    result, answer = signature.result, ffi.wasmtime_component_val_t()
    _check(
        ffi.wasmtime_component_func_call(
            ctypes.byref(function._func),  # noqa: SLF001  likewise
            context.pointer,
            params,
            len(arguments),
            ctypes.byref(answer) if result is not None else None,
            1 if result is not None else 0,
        )
    )
    for value in params:
        quick.value_delete(ctypes.byref(value))
    if result is None:
        return None
    lifted = result.lift(context, answer)
    quick.value_delete(ctypes.byref(answer))
    return lifted


def _check(error: Any) -> None:
    if error:
        raise wasmtime.WasmtimeError._from_ptr(error)  # noqa: SLF001  likewise
