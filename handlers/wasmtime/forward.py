"""Two small modules between a guest and WASI: calls on sockets come to us, files are counted, all else stays native.

    guest ──import──▶ front: each function jumps through a table ──▶ back: whose descriptor is it?
                                                                      ├─ a socket's ──▶ our function
                                                                      └─ any other ──▶ the engine's function

A call into Python costs 50 times a native one, so only calls on sockets may take it; how many files a guest has open,
which are descriptors of the daemon, the back counts itself. The back can be made only when the
guest exists, since it re-exports the guest's memory: the engine's functions look for `memory` in their caller. Hence
the table. Invariant: the modules are the same for all guests and compiled once.
"""

from __future__ import annotations

from typing import Final

from handlers.wasmtime.errnos import Errno
from handlers.wasmtime.socket_calls import PARAMETERS
from handlers.wasmtime.sockets import FIRST_CONNECTION, FIRST_LISTENER

WASI: Final = "wasi_snapshot_preview1"
FILES: Final = 1024
"""A guest may have so many files open at once; the next one is `errno.mfile`. It is what a process usually has."""
OPENING: Final = {
    "path_open": "i32 i32 i32 i32 i32 i64 i64 i32 i32",
    "fd_renumber": "i32 i32",
}
"""Functions that change how many there are, with their parameters. `fd_close` is among those on sockets too."""
TABLE: Final = "table"
MEMORY: Final = "memory"


_FUNCTIONS: Final = len(PARAMETERS) + len(OPENING)


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
    for index, (name, parameters) in enumerate(OPENING.items(), len(PARAMETERS)):
        types.append(f"(type ${name} (func (param {parameters}) (result i32)))")
        functions.append(
            f'(func (export "{name}") (type ${name}) {_arguments(len(parameters.split()))}'
            f" (call_indirect (type ${name}) (i32.const {index})))"
        )
    return f'(module {" ".join(types)} (table (export "{TABLE}") {_FUNCTIONS} funcref) {" ".join(functions)})'


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
    imports += [
        f'(import "native" "{name}" (func $native_{name} (param {parameters}) (result i32)))'
        for name, parameters in OPENING.items()
    ]
    functions = [
        f"(func ${name} (param{' i32' * count}) (result i32) (if (result i32) (call $ours (local.get 0))"
        f" (then {_arguments(count)} (call $hook_{name})) (else {_arguments(count)} (call $native_{name})"
        f" {'(call $closed)' if name == 'fd_close' else ''})))"
        for name, count in PARAMETERS.items()
    ]
    names = " ".join(f"${name}" for name in (*PARAMETERS, *OPENING))
    return f"""(module
      (import "guest" "{MEMORY}" (memory 0)) (import "front" "{TABLE}" (table {_FUNCTIONS} funcref))
      (import "hook" "listeners" (global $listeners i32)) {" ".join(imports)}
      (export "{MEMORY}" (memory 0))
      (func $ours (param i32) (result i32) (i32.or
        (i32.lt_u (i32.sub (local.get 0) (i32.const {FIRST_LISTENER})) (global.get $listeners))
        (i32.ge_u (local.get 0) (i32.const {FIRST_CONNECTION}))))
      (global $open (mut i32) (i32.const 0))
      (func $closed (param $errno i32) (result i32)
        (if (i32.and (i32.eqz (local.get $errno)) (i32.gt_s (global.get $open) (i32.const 0)))
          (then (global.set $open (i32.sub (global.get $open) (i32.const 1)))))
        (local.get $errno))
      (func $path_open (param {OPENING["path_open"]}) (result i32) (local $errno i32)
        (if (i32.ge_s (global.get $open) (i32.const {FILES})) (then (return (i32.const {Errno.MFILE:d}))))
        (local.set $errno {_arguments(9)} (call $native_path_open))
        (if (i32.eqz (local.get $errno)) (then (global.set $open (i32.add (global.get $open) (i32.const 1)))))
        (local.get $errno))
      (func $fd_renumber (param {OPENING["fd_renumber"]}) (result i32)
        (if (i32.eq (local.get 0) (local.get 1)) (then (return {_arguments(2)} (call $native_fd_renumber))))
        {_arguments(2)} (call $native_fd_renumber) (call $closed))
      {" ".join(functions)} (elem (i32.const 0) func {names}))"""


def _arguments(count: int) -> str:
    return " ".join(f"(local.get {index})" for index in range(count))
