"""A component (WASI 0.2) as a guest's program: its export `wasi:cli/run`, called once. In a worker only.

What a component imports comes from the engine, or all of it from `handlers.wasmtime.wasip2` where it uses the network,
which the engine's Python API denies. Nothing interrupts a component in a call of the engine's: its worker ends it.
Invariant: the exit code is what it exits with; one that returns knows success and failure only, 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import wasmtime
from wasmtime.component import Component, Linker

from cri_shim.model.errors import FailedPrecondition
from handlers.wasmtime.ending import Ending
from handlers.wasmtime.guest import Guest, Linked, one_line
from handlers.wasmtime.guest_spec import DEFAULT_FUNCTION
from handlers.wasmtime.wasi import wasi_config
from handlers.wasmtime.wasip2 import calls
from handlers.wasmtime.wasip2.linker import link, not_provided
from handlers.wasmtime.wasip2.resources import Table
from handlers.wasmtime.wasip2.world import new_world

_RUN: Final = "wasi:cli/run@0.2."
_HTTP: Final = "wasi:http/incoming-handler@"
_NETWORK: Final = ("wasi:sockets/tcp-create-", "wasi:sockets/udp-create-", "wasi:sockets/ip-name-lookup@")
"""Who imports others of these only, as adapters of preview 1 do, has no socket to use them on."""
_NATIVE: Final = ("wasi:cli/", "wasi:clocks/", "wasi:filesystem/", "wasi:io/", "wasi:random/", "wasi:sockets/")
_FAILED: Final = 1


def link_component(guest: Guest, resources: ExitStack) -> Linked:
    """A `Program`. FailedPrecondition names what the component imports and the host has not."""
    try:
        component = Component.deserialize_file(guest.engine, str(guest.compiled))
    except wasmtime.WasmtimeError as error:
        raise guest.unusable(error) from None
    export = _run_export(guest, component)
    imports = list(component.type.imports(guest.engine))
    store = wasmtime.Store(guest.engine)
    store.set_epoch_deadline(1)
    if any(name.startswith(_NETWORK) for name in imports):
        world = new_world(guest, resources)
        linker, table = link(world, component, guest.engine, resources), world.table
        guest.wait_in(world)
        output = guest.give_files(lambda output: world.open(output, resources), resources)
    else:
        linker, table = _native_linker(guest.engine, imports), Table()
        output = guest.give_files(lambda output: store.set_wasi(wasi_config(guest.spec, output)), resources)
    run = _Run(guest, store, linker, component, export, table)
    return Linked(store, output, run.execute)


def _native_linker(engine: wasmtime.Engine, imports: Iterable[str]) -> Linker:
    for name in imports:
        if not name.startswith(_NATIVE):
            raise not_provided(name)
    linker = Linker(engine)
    linker.add_wasip2()
    return linker


def _run_export(guest: Guest, component: Component) -> str:
    if guest.spec.entry.function != DEFAULT_FUNCTION:
        msg = f"a component has no function {guest.spec.entry.function!r} to call"
        raise FailedPrecondition(msg, hint="leave out the part of command[0] from # on")
    exports = list(component.type.exports(guest.engine))
    found = next((name for name in exports if name.startswith(_RUN)), None)
    if found is None:
        serves = any(name.startswith(_HTTP) for name in exports)
        what = "is for wasi:http, which is not supported yet" if serves else "exports no wasi:cli/run@0.2"
        msg = f"the component {what}"
        raise FailedPrecondition(msg, hint="build a command component, for example for wasm32-wasip2")
    return found


@dataclass(frozen=True, slots=True)
class _Run:
    guest: Guest
    store: wasmtime.Store
    linker: Linker
    component: Component
    export: str
    table: Table

    def execute(self) -> Ending:
        guest = self.guest
        if guest.is_stopping:
            return Ending(signal=guest.signal)
        try:
            return Ending(code=self._call())
        except wasmtime.ExitTrap as error:
            return Ending(code=error.code)
        except Exception as error:  # noqa: BLE001  a container ends, whatever ended it
            if guest.code is not None:
                return Ending(code=guest.code)
            trap = guest.defect or str(error).strip() or one_line(error) or type(error).__name__
            return Ending(signal=guest.signal, trap=trap)

    def _call(self) -> int:
        instance = self.linker.instantiate(self.store, self.component)
        interface = instance.get_export_index(self.store, self.export)
        index = instance.get_export_index(self.store, "run", interface)
        run = instance.get_func(self.store, index) if index is not None else None
        if run is None:
            msg = f"{self.export} has no function run"
            raise TypeError(msg)
        outcome, _ = calls.call(self.table, self.store, run)
        return 0 if outcome == "ok" else _FAILED
