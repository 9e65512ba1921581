"""Two small modules between a guest and WASI, by which calls on sockets come to us and all others stay native.

    guest ──import──▶ front: each function jumps through a table ──▶ back: whose descriptor is it?
                                                                      ├─ a socket's ──▶ our function
                                                                      └─ any other ──▶ the engine's function

A call into Python costs 50 times a native one, so only calls on sockets may take it. The back can be made only when the
guest exists, since it re-exports the guest's memory: the engine's functions look for `memory` in their caller. Hence
the table. Invariant: the modules are the same for all guests and compiled once.
"""

from __future__ import annotations

from typing import Final

from handlers.wasmtime.socket_calls import PARAMETERS
from handlers.wasmtime.sockets import FIRST_CONNECTION, FIRST_LISTENER

WASI: Final = "wasi_snapshot_preview1"
TABLE: Final = "table"
MEMORY: Final = "memory"


def front_text() -> str:
    """The module that the guest is linked with: exports the functions, and the table that they go through."""
    functions = [
        f'(func (export "{name}") (param{" i32" * count}) (result i32) {_arguments(count)}'
        f" (call_indirect (type $t{count}) (i32.const {index})))"
        for index, (name, count) in enumerate(PARAMETERS.items())
    ]
    types = [
        f"(type $t{count} (func (param{' i32' * count}) (result i32)))" for count in sorted(set(PARAMETERS.values()))
    ]
    return f'(module {" ".join(types)} (table (export "{TABLE}") {len(PARAMETERS)} funcref) {" ".join(functions)})'


def back_text() -> str:
    """The module that fills the table.

    Imports: `guest memory`, `front table`, `hook listeners` (their number), and each function twice, as of `hook` and
    of `native`.
    """
    imports = [
        f'(import "{source}" "{name}" (func ${source}_{name} (param{" i32" * count}) (result i32)))'
        for name, count in PARAMETERS.items()
        for source in ("hook", "native")
    ]
    functions = [
        f"(func ${name} (param{' i32' * count}) (result i32) (if (result i32) (call $ours (local.get 0))"
        f" (then {_arguments(count)} (call $hook_{name})) (else {_arguments(count)} (call $native_{name}))))"
        for name, count in PARAMETERS.items()
    ]
    names = " ".join(f"${name}" for name in PARAMETERS)
    return f"""(module
      (import "guest" "{MEMORY}" (memory 0)) (import "front" "{TABLE}" (table {len(PARAMETERS)} funcref))
      (import "hook" "listeners" (global $listeners i32)) {" ".join(imports)}
      (export "{MEMORY}" (memory 0))
      (func $ours (param i32) (result i32) (i32.or
        (i32.lt_u (i32.sub (local.get 0) (i32.const {FIRST_LISTENER})) (global.get $listeners))
        (i32.ge_u (local.get 0) (i32.const {FIRST_CONNECTION}))))
      {" ".join(functions)} (elem (i32.const 0) func {names}))"""


def _arguments(count: int) -> str:
    return " ".join(f"(local.get {index})" for index in range(count))
