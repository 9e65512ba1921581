"""Guests that mean harm, from Wasm text: each takes more of one thing than it may have.

Those that other tests use as well are in `tests.support.wasm`.
"""

from __future__ import annotations

import random
from typing import Final

from tests.support import wasm

_ALLOCATE: Final = """(module (type $list (struct (field $next (ref null $list)) (field i64) (field i64)))
  (memory (export "memory") {pages})
  (func (export "_start") (local $all (ref null $list)) {first}
    (loop $more (local.set $all (struct.new $list (local.get $all) (i64.const 1) (i64.const 2))) (br $more))))"""
GC_HEAP: Final = _ALLOCATE.format(pages="1", first="")
"""A list that never ends."""
GC_HEAP_AND_MEMORY: Final = _ALLOCATE.format(
    pages="1",
    first="""(loop $fill (if (i32.ne (memory.grow (i32.const 1)) (i32.const -1)) (then
      (memory.fill (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 65536)) (i32.const 1)
        (i32.const 65536)) (br $fill))))""",
)
"""Takes all the memory that it gets, and then as much once more as objects."""

_GROW: Final = (
    "(loop $more{0} (br_if $more{0} (i32.ne (table.grow ${0} (ref.null {1}) (i32.const 1000)) (i32.const -1))))"
)
TABLES: Final = f"""(module (memory (export "memory") 1) (table $a 1 funcref) (table $b 1 externref)
  (table $c 1 funcref) (table $d 1 anyref)
  (func (export "_start") {_GROW.format("a", "func")} {_GROW.format("b", "extern")} {_GROW.format("c", "func")}
    {_GROW.format("d", "any")} unreachable))"""
"""Four tables that grow until they are refused."""
_EXIT: Final = """(import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))"""


def wants(pages: int, otherwise: str, most: str = "", *, at_start: bool = False) -> str:
    """Asks for so many pages at once, and writes to all of them; does something else when it is refused them.

    `at_start`: in its start function, and nothing after that.
    """
    when = '(start $wants) (func (export "_start")) (func $wants' if at_start else '(func (export "_start")'
    return f"""(module {_EXIT} (memory (export "memory") 1 {most})
      {when}
        (if (i32.eq (memory.grow (i32.const {pages})) (i32.const -1)) (then {otherwise}))
        (memory.fill (i32.const 65536) (i32.const 1) (i32.const {pages % 65536 << 16}))))"""


TRIES_LESS: Final = f"""(module {_EXIT} (memory (export "memory") 1)
  (func (export "_start") (local $pages i32)
    (local.set $pages (i32.const 2048))
    (loop $again
      (if (i32.eq (memory.grow (local.get $pages)) (i32.const -1)) (then
        (local.set $pages (i32.shr_u (local.get $pages) (i32.const 1))) (br $again))))
    (call $exit (i32.const 3))))"""
HUGE_TABLE: Final = '(module (memory (export "memory") 1) (table 100000000 funcref) (func (export "_start")))'
EXCEPTIONS: Final = """(module (tag $t (param i64)) (table $kept (export "kept") 1 exnref) (memory (export "memory") 1)
  (func $thrown (result exnref) (block $b (result exnref)
    (try_table (catch_all_ref $b) (throw $t (i64.const 1))) unreachable))
  (func (export "_start") (loop $more
    (br_if $more (i32.ne (table.grow $kept (call $thrown) (i32.const 1)) (i32.const -1)))) unreachable))"""
"""Keeps every exception that it throws."""


def described(kind: str, number: int) -> bytes:
    """A module of few instructions that has so many `types`, `exports`, or element `segments`; it spins."""
    sections = {
        1: [b"\x60\0\0"],
        3: [b"\0"],
        4: [b"\x70\0\1"],
        5: [b"\0\1"],
        7: [b"\x06_start\0\0", b"\x06memory\2\0"],
        9: list[bytes](),
        10: [b"\x07\0\x03\x40\x0c\0\x0b\x0b"],
    }
    if kind == "types":
        sections[1] += [
            b"\x60\x14" + bytes(0x7C + (each >> 2 * bit & 3) for bit in range(20)) + b"\0" for each in range(number)
        ]
    elif kind == "exports":
        sections[7] += [b"\x07%07d\0\0" % each for each in range(number)]
    else:
        sections[9] += [b"\1\0\x32" + bytes(50)] * number
    bodies = {kind: wasm.leb(len(items)) + b"".join(items) for kind, items in sections.items()}
    return b"\0asm\1\0\0\0" + b"".join(bytes([kind]) + wasm.leb(len(body)) + body for kind, body in bodies.items())


def writes_much(pages: int) -> str:
    """Writes a buffer of so many pages to a file of its first directory, a few times."""
    return f"""(module
      (import "wasi_snapshot_preview1" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_pwrite" (func $write (param i32 i32 i32 i64 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") {pages}) (data (i32.const 1024) "much")
      (func $put (call $exit (call $write (i32.load (i32.const 32)) (i32.const 0) (i32.const 1) (i64.const 0)
        (i32.const 8))))
      (func (export "_start") (local $left i32)
        (drop (call $open (i32.const 3) (i32.const 0) (i32.const 1024) (i32.const 4) (i32.const 1)
          (i64.const 64) (i64.const 64) (i32.const 0) (i32.const 32)))
        (i32.store (i32.const 4) (i32.const {pages << 16}))
        (local.set $left (i32.const 5))
        (loop $more
          (drop (call $write (i32.load (i32.const 32)) (i32.const 0) (i32.const 1) (i64.const 0) (i32.const 8)))
          (br_if $more (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
        (call $put)))"""


def recurses(call: str) -> str:
    """Calls itself until the stack is used up, and `$random` or `$poll` of the host at each depth past most of it."""
    return f"""(module
      (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1)
      (func $down (param $depth i32) (result i32)
        (if (i32.gt_u (local.get $depth) (i32.const 10000)) (then
          (if (i32.eqz (i32.rem_u (local.get $depth) (i32.const 500))) (then {call}))))
        (i32.add (call $down (i32.add (local.get $depth) (i32.const 1))) (local.get $depth)))
      (func (export "_start") (drop (call $down (i32.const 0)))))"""


MANY_MEMORIES: Final = f'(module {"(memory 1000)" * 50} (func (export "_start")))'


def opens(name: str, times: int, *, close: bool = False) -> str:
    """Opens a file of its first directory so many times, and exits with 1 + the errno that it then got, else 0."""
    closes = "(drop (call $close (i32.load (i32.const 32))))" if close else ""
    return f"""(module
      (import "wasi_snapshot_preview1" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (data (i32.const 1024) "{name}")
      (func (export "_start") (local $left i32) (local $errno i32)
        (local.set $left (i32.const {times}))
        (loop $more
          (local.set $errno (call $open (i32.const 3) (i32.const 0) (i32.const 1024) (i32.const {len(name)})
            (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 32)))
          (if (local.get $errno) (then (call $exit (i32.add (local.get $errno) (i32.const 1)))))
          {closes}
          (br_if $more (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))))"""


def moves(call: str, source: tuple[int, str], target: tuple[int, str]) -> str:
    """`path_rename`, `path_link` (a hard link) or `path_symlink` between two directories; exits with the errno."""
    (from_fd, old), (to_fd, new) = source, target
    if call == "path_symlink":
        parameters, arguments = (
            "i32 i32 i32 i32 i32",
            f"""(i32.const 1024) (i32.const {len(old)})
            (i32.const {to_fd}) (i32.const 2048) (i32.const {len(new)})""",
        )
    else:
        flags = "(i32.const 0)" if call == "path_link" else ""
        parameters = "i32 i32 i32 i32 i32 i32" + (" i32" if flags else "")
        arguments = f"""(i32.const {from_fd}) {flags} (i32.const 1024) (i32.const {len(old)})
            (i32.const {to_fd}) (i32.const 2048) (i32.const {len(new)})"""
    return f"""(module
      (import "wasi_snapshot_preview1" "{call}" (func $move (param {parameters}) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (data (i32.const 1024) "{old}") (data (i32.const 2048) "{new}")
      (func (export "_start") (call $exit (call $move {arguments}))))"""


def mutated(module: bytes, generator: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled or from elsewhere in it; the header mostly stays, or nobody reads on."""
    data = bytearray(module)
    first = 0 if generator.random() < 0.02 else 8
    for _ in range(generator.choice((1, 1, 1, 1, 2, 8))):
        at = generator.randrange(first, len(data)) if len(data) > first else 0
        size = generator.choice((1, 1, 2, 4, 16, 64))
        kind = generator.choice((0, 0, 0, 1, 1, 1, 2, 3, 4))
        if kind == 0:
            data[at : at + 1] = bytes((generator.randrange(256),))
        elif kind == 1:
            data[at : at + 1] = bytes((data[at] ^ (1 << generator.randrange(8)),)) if data else b"x"
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size]
        else:
            other = generator.randrange(len(data) or 1)
            data[at : at + size] = data[other : other + size]
    return bytes(data)


SEEDS: Final = (
    wasm.HELLO,
    wasm.ECHO,
    wasm.CLOCK,
    wasm.CAT,
    wasm.LIBRARY,
    wasm.GREETER,
    wasm.prints_file(3, "file"),
    *wasm.PROGRAMS.values(),
    GC_HEAP,
    TABLES,
    EXCEPTIONS,
)
"""What is tampered with."""
