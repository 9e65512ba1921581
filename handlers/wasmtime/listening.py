"""Links a core module with sockets, or to count its files: opens what it listens on, and puts two modules around it.

Not the functions on sockets (`handlers.wasmtime.socket_calls`). Invariant: the sockets are the pod's, whatever thread
or process the guest runs in, and are closed when it has ended.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import wasmtime

from cri_shim.model.errors import FailedPrecondition
from handlers.wasmtime import sockets
from handlers.wasmtime.forward import LOOKING, MEMORY, OPENING, TABLE, WASI
from handlers.wasmtime.guest import Guest
from handlers.wasmtime.guest_spec import Listen
from handlers.wasmtime.hooks import Hooked
from handlers.wasmtime.native import NativeModule
from handlers.wasmtime.socket_calls import PARAMETERS, Calls

Instantiate = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """A module on its way, or what waits for one: the linker has WASI and the hooks."""

    module: NativeModule
    linker: wasmtime.Linker
    hooks: Hooked
    store: wasmtime.Store


def link_sockets(guest: Guest, listen: Listen, parts: Parts, resources: ExitStack) -> Instantiate:
    """Open the sockets, if any, and link the module with them. FailedPrecondition names a port that cannot be had."""
    opened = sockets.Sockets(_opened(listen), guest.resting)
    resources.callback(opened.close)
    guest.socket_calls = Calls(opened, has_directories=bool(guest.spec.preopens))
    if listen.ports:
        guest.wait_in(opened)
    front, back = (_load(guest, path) for path in (listen.front, listen.back))
    store = parts.store
    entry = wasmtime.Linker(guest.engine).instantiate(store, front)
    for name in (*PARAMETERS, *OPENING):
        parts.linker.define(store, WASI, name, entry.exports(store)[name])
    return functools.partial(_instantiate, guest.engine, parts, back, entry, len(listen.ports))


def _instantiate(
    engine: wasmtime.Engine,
    parts: Parts,
    back: wasmtime.Module,
    front: wasmtime.Instance,
    listeners: int,
) -> None:
    """The module, and behind it what its calls on descriptors go to."""
    store = parts.store
    parts.module.instantiate_anew()
    memory = parts.module.memory()
    if memory is None:
        msg = f"the module exports no {MEMORY}"
        raise TypeError(msg)
    native, behind = wasmtime.Linker(engine), wasmtime.Linker(engine)
    native.define_wasi()
    parts.hooks.define_sockets(behind, "hook")
    count = wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i32(), False), wasmtime.Val.i32(listeners))
    behind.define(store, "hook", "listeners", count)
    behind.define(store, "guest", MEMORY, memory)
    behind.define(store, "front", TABLE, front.exports(store)[TABLE])
    for name in (*PARAMETERS, *OPENING, LOOKING):
        behind.define(store, "native", name, native.get(store, WASI, name))
    behind.instantiate(store, back)


def _opened(listen: Listen) -> list[socket.socket]:
    make = functools.partial(sockets.listen, listen.ports)
    try:
        if not listen.netns:
            return make()
        from cri_shim.kernel.namespaces import run_in_netns  # noqa: PLC0415  brings asyncio: not for workers

        return run_in_netns(Path(listen.netns), make)
    except OSError as error:
        from cri_shim.spec.dispatch import LISTEN_ANNOTATION  # noqa: PLC0415  brings protobuf: likewise

        msg = f"annotation {LISTEN_ANNOTATION}: port {error.filename}: {error.strerror}"
        raise FailedPrecondition(msg) from error


def _load(guest: Guest, path: str) -> wasmtime.Module:
    try:
        return wasmtime.Module.deserialize_file(guest.engine, path)
    except wasmtime.WasmtimeError as error:
        raise guest.unusable(error) from None
