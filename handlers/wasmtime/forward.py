"""Two small modules between a guest and WASI: calls on sockets come to us, files are counted and looked at before they
are opened, all else stays native.

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
LOOKING: Final = "path_filestat_get"
"""The engine's function that says what is there, and opens nothing."""
TABLE: Final = "table"
MEMORY: Final = "memory"
_FILESTAT_WORDS: Final = 8
"""`filestat`, in words of 64 bits. The type is the first byte of the third."""
_CAN_BE_OPENED: Final = 1 << 3 | 1 << 4 | 1 << 7
"""Types (`filetype`): directory, regular file, and symbolic link, which only those get told who do not follow it."""

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
    of `native`; of `native` also `LOOKING`.

    Opening a FIFO waits for who has its other end, in a call of the engine's that nothing interrupts, and opening a
    device has effects: so the type is asked for first. What takes the name of a file in between is opened.
    """
    imports = [
        f'(import "{source}" "{name}" (func ${source}_{name} (param{" i32" * count}) (result i32)))'
        for name, count in PARAMETERS.items()
        for source in ("hook", "native")
    ]
    imports.append(f'(import "native" "{LOOKING}" (func $look (param i32 i32 i32 i32 i32) (result i32)))')
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
      {_unfit()}
      (func $path_open (param {OPENING["path_open"]}) (result i32) (local $errno i32)
        (if (i32.ge_s (global.get $open) (i32.const {FILES})) (then (return (i32.const {Errno.MFILE:d}))))
        (local.set $errno {_arguments(4)} (call $unfit))
        (if (local.get $errno) (then (return (local.get $errno))))
        (local.set $errno {_arguments(9)} (call $native_path_open))
        (if (i32.eqz (local.get $errno)) (then (global.set $open (i32.add (global.get $open) (i32.const 1)))))
        (local.get $errno))
      (func $fd_renumber (param {OPENING["fd_renumber"]}) (result i32)
        (if (i32.eq (local.get 0) (local.get 1)) (then (return {_arguments(2)} (call $native_fd_renumber))))
        {_arguments(2)} (call $native_fd_renumber) (call $closed))
      {" ".join(functions)} (elem (i32.const 0) func {names}))"""


def _unfit() -> str:
    """The errno for a path, by what is there; 0 = whoever opens it says what is wrong, if anything is.

    The engine answers into the guest's memory, whose first bytes are as before when the guest goes on.
    """
    words = range(_FILESTAT_WORDS)
    keep = " ".join(f"(local.set $w{word} (i64.load (i32.const {8 * word})))" for word in words)
    put_back = " ".join(f"(i64.store (i32.const {8 * word}) (local.get $w{word}))" for word in words)
    return f"""(func $unfit (param i32 i32 i32 i32) (result i32) (local $errno i32) (local $type i32)
        {" ".join(f"(local $w{word} i64)" for word in words)}
        (if (i32.eqz (memory.size)) (then (return (i32.const 0))))
        {keep}
        (local.set $errno {_arguments(4)} (i32.const 0) (call $look))
        (local.set $type (i32.load8_u (i32.const 16)))
        {put_back}
        (if (local.get $errno) (then (return (i32.const 0))))
        (if (i32.and (i32.shl (i32.const 1) (local.get $type)) (i32.const {_CAN_BE_OPENED}))
          (then (return (i32.const 0))))
        (select (i32.const {Errno.ACCES:d}) (i32.const {Errno.NXIO:d}) (local.get $type)))"""


def _arguments(count: int) -> str:
    return " ".join(f"(local.get {index})" for index in range(count))
