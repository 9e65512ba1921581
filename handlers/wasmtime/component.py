"""A component (WASI 0.2) as a guest's program: its export `wasi:cli/run`, or a function, called once. In a worker only.

What a component imports comes from the engine, or all of it from `handlers.wasmtime.wasip2` where it uses the network,
which the engine's Python API denies. One that exports `wasi:http/incoming-handler` in place of `wasi:cli/run` is
served (`wasip2.http_proxy`). Nothing interrupts a component in a call of the engine's: its worker ends it.
Invariant: the exit code is what it exits with; one that returns knows success and failure only, 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import wasmtime
from wasmtime.component import Component, FuncType, Linker, ResultType

from cri_shim.model.errors import FailedPrecondition
from cri_shim.spec.dispatch import LISTEN_ANNOTATION
from handlers.wasmtime.ending import Ending, shorten
from handlers.wasmtime.guest import Guest, Linked, one_line
from handlers.wasmtime.guest_spec import DEFAULT_FUNCTION
from handlers.wasmtime.native import address
from handlers.wasmtime.wasi import set_wasi
from handlers.wasmtime.wasip2 import calls
from handlers.wasmtime.wasip2.linker import is_known, link, not_provided
from handlers.wasmtime.wasip2.resources import Table
from handlers.wasmtime.wasip2.world import new_world

_RUN: Final = "wasi:cli/run@0.2."
_HTTP: Final = "wasi:http/incoming-handler@0.2."
_NETWORK: Final = (
    *("wasi:sockets/tcp-create-", "wasi:sockets/udp-create-", "wasi:sockets/ip-name-lookup@"),
    "wasi:http/",
)
"""Who imports other sockets only, as adapters of preview 1 do, has no socket to use them on."""
_FAILED: Final = 1


def link_component(guest: Guest, resources: ExitStack) -> Linked:
    """A `Program`. FailedPrecondition names what the component imports and the host has not."""
    try:
        component = Component.deserialize_file(guest.engine, guest.compiled)
    except wasmtime.WasmtimeError as error:
        raise guest.unusable(error) from None
    wanted = guest.spec.entry.function
    if wanted == DEFAULT_FUNCTION and (served := _served(guest, component)):
        from handlers.wasmtime.wasip2.http_proxy import link_proxy  # noqa: PLC0415  for those who need it

        return link_proxy(guest, component, served, resources)
    path = (_run_export(guest, component), "run") if wanted == DEFAULT_FUNCTION else (_function(guest, component),)
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
        context = address(store._context())  # noqa: SLF001  the library has no other way
        output = guest.give_files(lambda output: set_wasi(context, guest.spec, output, resources), resources)
    run = _Run(guest, store, linker, component, path, table)
    return Linked(store, output, run.execute)


def _native_linker(engine: wasmtime.Engine, imports: Iterable[str]) -> Linker:
    for name in imports:
        if not is_known(name):
            raise not_provided(name)
    linker = Linker(engine)
    linker.add_wasip2()
    return linker


def _served(guest: Guest, component: Component) -> str | None:
    """The export that answers requests, if that is what the component is for."""
    exports = list(component.type.exports(guest.engine))
    asked = guest.spec.http is not None and guest.spec.http.asked
    found = next((name for name in exports if name.startswith(_HTTP)), None)
    if found is None and asked:
        msg = f"annotation {LISTEN_ANNOTATION}: the component exports no {_HTTP}*, and has no descriptors to be given"
        raise FailedPrecondition(msg)
    return found if asked or not any(name.startswith(_RUN) for name in exports) else None


def _run_export(guest: Guest, component: Component) -> str:
    exports = list(component.type.exports(guest.engine))
    found = next((name for name in exports if name.startswith(_RUN)), None)
    if found is None:
        msg = f"the component exports neither {_RUN}* nor {_HTTP}*"
        raise FailedPrecondition(msg, hint="build a command component, for example for wasm32-wasip2")
    return found


def _function(guest: Guest, component: Component) -> str:
    """What is named after the # of command[0]: it may give back nothing, or a result."""
    wanted = guest.spec.entry.function
    if guest.spec.http is not None and guest.spec.http.asked:
        msg = f"annotation {LISTEN_ANNOTATION}: of the component function {wanted!r} is called, and nothing is served"
        raise FailedPrecondition(msg)
    exports = component.type.exports(guest.engine)
    items = {name: extern.ty for name, extern in exports.items()}
    functions = {name: kind for name, kind in items.items() if isinstance(kind, FuncType)}
    if wanted not in functions:
        there_are = f", which exports {shorten(', '.join(sorted(functions)))}" if functions else ""
        msg = f"the component exports no function {wanted!r}"
        raise FailedPrecondition(msg, hint=f"leave out the part of command[0] from # on, or name another{there_are}")
    kind = functions[wanted]
    if kind.params or not (kind.result is None or isinstance(kind.result, ResultType)):
        msg = f"the component's function {wanted!r} takes parameters, or gives back what is no exit code"
        raise FailedPrecondition(msg)
    return wanted


@dataclass(frozen=True, slots=True)
class _Run:
    guest: Guest
    store: wasmtime.Store
    linker: Linker
    component: Component
    path: tuple[str, ...]
    """Of the function: the names of exports, one in the other."""
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
        index = None
        for name in self.path:
            index = instance.get_export_index(self.store, name, index)
            if index is None:
                break
        run = instance.get_func(self.store, index) if index is not None else None
        if run is None:
            msg = f"the component has no function {' '.join(self.path)}"
            raise TypeError(msg)
        result = calls.call(self.table, self.store, run)
        return 0 if result is None or result[0] == "ok" else _FAILED
