"""A component (WASI 0.2) as a guest's program: its export `wasi:cli/run`, called once. In a worker only.

Not for `wasi:http`, and without `wasi:sockets`, which the engine's Python API denies. Nothing interrupts a component in
a call of the host: its worker ends it. Invariant: WASI 0.2 knows success and failure only, so the exit code is 0 or 1.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import wasmtime
from wasmtime.component import Component, Linker

from cri_shim.model.errors import FailedPrecondition
from handlers.wasmtime.ending import Ending
from handlers.wasmtime.guest import Guest, Linked, one_line
from handlers.wasmtime.guest_spec import DEFAULT_FUNCTION

_RUN: Final = "wasi:cli/run@0.2."
_HTTP: Final = "wasi:http/incoming-handler@"
_FAILED: Final = 1


def link_component(guest: Guest, resources: ExitStack) -> Linked:
    """A `Program`. What the component imports and the host has not is an error when it is instantiated, here too."""
    try:
        component = Component.deserialize_file(guest.engine, str(guest.compiled))
    except wasmtime.WasmtimeError as error:
        raise guest.unusable(error) from None
    export = _run_export(guest, component)
    linker = Linker(guest.engine)
    linker.add_wasip2()
    store = wasmtime.Store(guest.engine)
    store.set_epoch_deadline(1)
    run = _Run(guest, store, linker, component, export)
    return Linked(store, guest.give_files(store, resources), run.execute)


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

    def execute(self) -> Ending:
        if self.guest.is_stopping:
            return Ending(signal=self.guest.signal)
        try:
            return Ending(code=self._call())
        except wasmtime.ExitTrap as error:
            return Ending(code=error.code)
        except Exception as error:  # noqa: BLE001  a container ends, whatever ended it
            return Ending(signal=self.guest.signal, trap=str(error).strip() or one_line(error) or type(error).__name__)

    def _call(self) -> int:
        instance = self.linker.instantiate(self.store, self.component)
        interface = instance.get_export_index(self.store, self.export)
        index = instance.get_export_index(self.store, "run", interface)
        run = instance.get_func(self.store, index) if index is not None else None
        if run is None:
            msg = f"{self.export} has no function run"
            raise TypeError(msg)
        return 0 if getattr(run(self.store), "tag", None) == "ok" else _FAILED
