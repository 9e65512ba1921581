"""A core module of WASI preview 1, as a guest's program: what is linked, what is called, how it ended.

Not the thread and not the streams (`handlers.wasmtime.guest`). Invariant: what ended the module is read from the guest,
never from an exception, which may be another guest's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

import wasmtime

from cri_shim.model.errors import FailedPrecondition
from cri_shim.wire.wasm_shape import UNKNOWN, Shape
from handlers.wasmtime.ending import Ending, shorten
from handlers.wasmtime.guest import Guest, Linked, one_line
from handlers.wasmtime.guest_spec import DEFAULT_FUNCTION, GuestSpec
from handlers.wasmtime.hooks import hooked
from handlers.wasmtime.listening import Instantiate, Parts, link_sockets
from handlers.wasmtime.memory_budget import budget
from handlers.wasmtime.native import NativeModule
from handlers.wasmtime.refusal_note import read_note, start_name
from handlers.wasmtime.wasi import set_wasi

_INITIALIZE: Final = "_initialize"
_ABOVE_LIMIT: Final = ("exceeds memory limits", "exceeds table limits", "GC heap out of memory")
"""The engine's words when a module asks for more from the start than the store's limits, or of its GC heap."""
_SHOWN: Final = 20
"""Names that an error lists."""
_WASMEDGE_SOCKETS: Final = ("sock_open", "sock_bind", "sock_listen", "sock_connect", "sock_getaddrinfo")
"""Of the functions that WasmEdge has in `wasi_snapshot_preview1` besides those of WASI (wasmedge_wasi_socket)."""
_TABLES: Final = 4


def prepare(guest: Guest, resources: ExitStack) -> Parts:
    """All that a run needs whatever it is of. The store has the limits of a module without any."""
    linker = guest.new_linker(guest.engine)
    hooks = resources.enter_context(hooked(guest, linker))
    store = wasmtime.Store(guest.engine)
    _set_limits(store, 0, UNKNOWN, 0)
    guest.limit_memory = partial(_limit, store)
    hooks.watch_epoch(store)
    module = NativeModule(guest.engine, linker, store)
    resources.callback(module.close)
    return Parts(module, linker, hooks, store)


def link_module(guest: Guest, resources: ExitStack) -> Linked:
    """A `Program`: all that can fail for reasons that are not the module's own doing at run time."""
    return link_prepared(prepare(guest, resources), guest, resources)


def link_prepared(parts: Parts, guest: Guest, resources: ExitStack) -> Linked:
    """The same, with what `prepare` has made for this guest."""
    module, store, spec = parts.module, parts.store, guest.spec
    if spec.memory_limit or spec.listen is not None:
        _limit(store, spec)
    try:
        module.load(guest.compiled)
    except wasmtime.WasmtimeError as error:
        raise guest.unusable(error) from None
    try:
        module.link()  # here too where it is linked anew: it says what is missing
    except wasmtime.WasmtimeError as error:
        msg = f"the module cannot be linked: {one_line(error)}"
        raise FailedPrecondition(msg, hint=_how_to_link(str(error))) from None
    exported = module.functions()
    start = start_name(spec.entry.digest)
    has_start = exported.pop(start, None) is not None
    is_library = _is_library(exported, spec.entry.function)
    instantiate: Instantiate = module.instantiate
    if spec.listen is not None:
        instantiate = link_sockets(guest, spec.listen, parts, resources)
    first = [start] * has_start + [_INITIALIZE] * is_library
    run = _Run(guest, store, module, instantiate, (*first, spec.entry.function))
    trees = resources.enter_context(ExitStack())  # left after the end is told
    output = guest.give_files(lambda output: set_wasi(module.context, spec, output, trees), resources)
    return Linked(store, output, run.execute)


def _is_library(exported: Mapping[str, int], wanted: str) -> bool:
    """Whether there is something to initialise. FailedPrecondition when there is nothing to call."""
    if wanted not in exported:
        msg = f"the module exports no function {wanted!r}"
        raise FailedPrecondition(msg, hint=_what_to_call(exported))
    if exported[wanted]:
        msg = f"the module's function {wanted!r} takes parameters, which a container has none of"
        raise FailedPrecondition(msg)
    return wanted != DEFAULT_FUNCTION and _INITIALIZE in exported


def _what_to_call(exported: Mapping[str, int]) -> str:
    """What there is instead: functions without parameters."""
    names = [name for name, parameters in exported.items() if not parameters]
    there_are = f", which exports {shorten(', '.join(sorted(names)[:_SHOWN]))}" if names else ""
    return f"command[0] may name another one of the module{there_are}: module.wasm#FUNCTION"


def _how_to_link(text: str) -> str:
    """What an import that nobody has means: the toolchain was asked for another host."""
    if any(f"::{name}`" in text for name in _WASMEDGE_SOCKETS):
        return (
            "sockets of that kind are WasmEdge's own: run it by crun with wasm: native, build a component,"
            " or give it what it listens on by the annotation cri-shim.io/listen"
        )
    return "a core module gets wasi_snapshot_preview1 and nothing else: build it for wasm32-wasip1, Go for wasip1"


def _limit(store: wasmtime.Store, spec: GuestSpec) -> None:
    _set_limits(store, spec.memory_limit, spec.shape, 2 if spec.listen is not None else 0)


def _set_limits(store: wasmtime.Store, memory: int, shape: Shape, ours: int) -> None:
    """`ours`: modules of ours around the guest's."""
    limits = budget(memory, shape)
    store.set_limits(
        memory_size=limits.memory,
        table_elements=limits.elements,
        instances=1 + ours,
        tables=_TABLES + ours,
        memories=1,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """`functions`: what is called, one after the other."""

    guest: Guest
    store: wasmtime.Store
    module: NativeModule
    instantiate: Instantiate
    functions: Sequence[str]

    def execute(self) -> Ending:
        guest, module, trap = self.guest, self.module, ""
        if guest.is_stopping:
            return Ending(signal=guest.signal)
        try:
            self.instantiate()
            if guest.spec.worker is None:  # of a worker it is the cgroup that is looked at
                guest.meter.attach(self.store, module.memory())
            for function in self.functions:
                module.call(function)
        except Exception as error:  # noqa: BLE001  a container ends, whatever ended it
            trap = guest.defect or str(error).strip() or type(error).__name__
            error.with_traceback(None)  # its frames hold it, and with it the module until a collection
        if guest.code is not None:
            trap = ""  # which is how it comes out of `proc_exit`
        if not guest.code and (not trap or guest.signal is not None):
            return Ending(guest.code, guest.signal, trap)  # without a trap it has returned, as its input was taken away
        note = read_note(module, guest.spec.entry.digest)
        return Ending(
            guest.code,
            guest.signal,
            note.as_it_came(trap),
            out_of_memory=any(words in trap for words in _ABOVE_LIMIT),
            refused=note.refused(module) if guest.spec.memory_limit else 0,
        )
