"""Guests for tests, from Wasm text, assembled on the spot. WASI preview 1, no libraries.

assemble(HELLO)      the binary
GUESTS["hello"]      the text of each guest, by name
"""

from __future__ import annotations

import functools
from typing import Final

_WASI: Final = "wasi_snapshot_preview1"

_IMPORTS: Final = {
    "args_get": "(param i32 i32) (result i32)",
    "args_sizes_get": "(param i32 i32) (result i32)",
    "clock_time_get": "(param i32 i64 i32) (result i32)",
    "environ_get": "(param i32 i32) (result i32)",
    "environ_sizes_get": "(param i32 i32) (result i32)",
    "fd_close": "(param i32) (result i32)",
    "fd_fdstat_get": "(param i32 i32) (result i32)",
    "fd_fdstat_set_flags": "(param i32 i32) (result i32)",
    "fd_read": "(param i32 i32 i32 i32) (result i32)",
    "fd_write": "(param i32 i32 i32 i32) (result i32)",
    "path_open": "(param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)",
    "poll_oneoff": "(param i32 i32 i32 i32) (result i32)",
    "proc_exit": "(param i32)",
    "sock_accept": "(param i32 i32 i32) (result i32)",
}

# write(fd, address, length): one fd_write; the vector is at 0, the count at 8.
_WRITE: Final = """
  (func $write (param $fd i32) (param $at i32) (param $size i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $size))
    (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
"""

# sleep(ns): poll_oneoff with one relative timer of the monotonic clock; the subscription is at 64, the event at 128.
_SLEEP: Final = """
  (func $sleep (param $ns i64) (result i32)
    (i64.store (i32.const 64) (i64.const 7))
    (i32.store8 (i32.const 72) (i32.const 0))
    (i32.store (i32.const 80) (i32.const 1))
    (i64.store (i32.const 88) (local.get $ns))
    (i64.store (i32.const 96) (i64.const 0))
    (i32.store16 (i32.const 104) (i32.const 0))
    (call $poll_oneoff (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 192)))
"""


# line(fd, address, length, text): a prefix, a NUL-terminated string, a newline. number(text): its decimal value.
_STRINGS: Final = """
  (data (i32.const 32) "arg env \\nready\\n")
  (func $length (param $at i32) (result i32) (local $end i32)
    (local.set $end (local.get $at))
    (block $done (loop $next
      (br_if $done (i32.eqz (i32.load8_u (local.get $end))))
      (local.set $end (i32.add (local.get $end) (i32.const 1)))
      (br $next)))
    (i32.sub (local.get $end) (local.get $at)))
  (func $line (param $fd i32) (param $prefix i32) (param $size i32) (param $text i32)
    (call $write (local.get $fd) (local.get $prefix) (local.get $size))
    (call $write (local.get $fd) (local.get $text) (call $length (local.get $text)))
    (call $write (local.get $fd) (i32.const 40) (i32.const 1)))
  (func $lines (param $prefix i32) (param $pointer i32) (param $count i32)
    (block $done (loop $next
      (br_if $done (i32.eqz (local.get $count)))
      (call $line (i32.const 1) (local.get $prefix) (i32.const 4) (i32.load (local.get $pointer)))
      (local.set $pointer (i32.add (local.get $pointer) (i32.const 4)))
      (local.set $count (i32.sub (local.get $count) (i32.const 1)))
      (br $next))))
  (func $number (param $at i32) (result i32) (local $value i32)
    (block $done (loop $next
      (br_if $done (i32.eqz (i32.load8_u (local.get $at))))
      (local.set $value (i32.add (i32.mul (local.get $value) (i32.const 10))
        (i32.sub (i32.load8_u (local.get $at)) (i32.const 48))))
      (local.set $at (i32.add (local.get $at) (i32.const 1)))
      (br $next)))
    (local.get $value))
"""

# arguments(): their pointers from 1024 on, their number at 16.
_ARGUMENTS: Final = """
  (func $arguments
    (drop (call $args_sizes_get (i32.const 16) (i32.const 20)))
    (drop (call $args_get (i32.const 1024) (i32.const 8192))))
"""


# digits(value): where its decimal digits begin, NUL-terminated at 512.
_DIGITS: Final = """
  (func $digits (param $value i32) (result i32) (local $at i32)
    (local.set $at (i32.const 512))
    (loop $next
      (local.set $at (i32.sub (local.get $at) (i32.const 1)))
      (i32.store8 (local.get $at) (i32.add (i32.rem_u (local.get $value) (i32.const 10)) (i32.const 48)))
      (local.set $value (i32.div_u (local.get $value) (i32.const 10)))
      (br_if $next (local.get $value)))
    (local.get $at))
"""


def _guest(imports: str, body: str, *, pages: str = "1", parts: str = "") -> str:
    """A module with WASI functions by name and a memory."""
    lines = [f'(import "{_WASI}" "{name}" (func ${name} {_IMPORTS[name]}))' for name in imports.split()]
    return f'(module {" ".join(lines)} (memory (export "memory") {pages}) {parts} {body})'


HELLO: Final = _guest(
    "fd_write",
    """(data (i32.const 1024) "hello from wasm\\n")
    (func (export "_start") (call $write (i32.const 1) (i32.const 1024) (i32.const 16)))""",
    parts=_WRITE,
)
"""Prints one line and returns."""

# Strings are NUL-terminated one after the other: each NUL becomes a newline, and all is written at once.
ECHO: Final = _guest(
    "args_sizes_get args_get environ_sizes_get environ_get fd_write",
    """(func $lines (param $at i32) (param $size i32) (local $end i32) (local $i i32)
      (local.set $end (i32.add (local.get $at) (local.get $size)))
      (local.set $i (local.get $at))
      (loop $next (if (i32.lt_u (local.get $i) (local.get $end)) (then
        (if (i32.eqz (i32.load8_u (local.get $i))) (then (i32.store8 (local.get $i) (i32.const 10))))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br $next))))
      (call $write (i32.const 1) (local.get $at) (local.get $size)))
    (func (export "_start")
      (drop (call $args_sizes_get (i32.const 16) (i32.const 20)))
      (drop (call $args_get (i32.const 1024) (i32.const 8192)))
      (call $lines (i32.const 8192) (i32.load (i32.const 20)))
      (drop (call $environ_sizes_get (i32.const 16) (i32.const 20)))
      (drop (call $environ_get (i32.const 1024) (i32.const 16384)))
      (call $lines (i32.const 16384) (i32.load (i32.const 20))))""",
    parts=_WRITE,
)
"""Prints each argument and each variable on a line of its own."""

TRAP: Final = _guest("", '(func $deeper unreachable) (func (export "_start") (call $deeper))')
SPIN: Final = _guest("", '(func (export "_start") (loop $forever (br $forever)))')
SLEEP: Final = _guest(
    "poll_oneoff fd_write",
    """(data (i32.const 1024) "going to sleep\\n")
    (func (export "_start")
      (call $write (i32.const 1) (i32.const 1024) (i32.const 15))
      (drop (call $sleep (i64.const 3600000000000))))""",
    parts=_WRITE + _SLEEP,
)
"""Prints a line and sleeps for an hour."""

PROBED: Final = SLEEP.replace(
    '(func (export "_start")', '(func (export "healthy")) (func (export "sick") unreachable) (func (export "_start")'
)
"""The same, with a function that returns and one that traps."""

GROWN: Final = SLEEP.replace(
    '(func (export "_start")',
    """(func (export "_start") (drop (memory.grow (i32.const 256)))
      (memory.fill (i32.const 0x800000) (i32.const 1) (i32.const 0x800000))""",
)
"""The same with 16 MiB more, the upper half of it written to."""

RECURSE: Final = _guest(
    "",
    """(func $down (param $depth i64) (result i64)
      (i64.add (call $down (i64.add (local.get $depth) (i64.const 1))) (local.get $depth)))
    (func (export "_start") (drop (call $down (i64.const 0))))""",
)
"""Calls itself until the stack is used up."""

HOG: Final = _guest(
    "",
    """(func (export "_start") (loop $more
      (br_if $more (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
      unreachable)""",
)
"""Grows its memory page by page until it is refused, and aborts as an allocator would."""

GROWS: Final = _guest(
    "poll_oneoff",
    """(func (export "_start") (loop $more
      (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then (drop (call $sleep (i64.const 1000000)))))
      (br $more)))""",
    parts=_SLEEP,
)
"""Grows its memory page by page, and tries again each millisecond when it is refused."""

TOUCHING_HOG: Final = _guest(
    "",
    """(func (export "_start") (loop $more
      (memory.fill (i32.mul (memory.grow (i32.const 1)) (i32.const 65536)) (i32.const 1) (i32.const 65536))
      (br $more)))""",
)
"""Grows its memory page by page, and writes to all of it."""

HUGE: Final = _guest("", '(func (export "_start"))', pages="512")
"""Needs 32 MiB from the start."""

STDERR: Final = _guest(
    "fd_write",
    """(data (i32.const 1024) "to stdout\\nto stderr\\nno newline")
    (func (export "_start")
      (call $write (i32.const 1) (i32.const 1024) (i32.const 10))
      (call $write (i32.const 2) (i32.const 1034) (i32.const 10))
      (call $write (i32.const 1) (i32.const 1044) (i32.const 10)))""",
    parts=_WRITE,
)

CLOCK: Final = _guest(
    "clock_time_get poll_oneoff proc_exit",
    """(func $now (result i64)
      (drop (call $clock_time_get (i32.const 1) (i64.const 1) (i32.const 256))) (i64.load (i32.const 256)))
    (func (export "_start") (local $start i64) (local $slept i64)
      (local.set $start (call $now))
      (drop (call $sleep (i64.const 50000000)))
      ;; then until an absolute time, 50 ms later still
      (i64.store (i32.const 88) (i64.add (local.get $start) (i64.const 100000000)))
      (i32.store16 (i32.const 104) (i32.const 1))
      (drop (call $poll_oneoff (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 192)))
      (local.set $slept (i64.sub (call $now) (local.get $start)))
      ;; the event has the subscription's userdata; one event; the time is between 99 ms and 5 s
      (if (i64.ne (i64.load (i32.const 128)) (i64.const 7)) (then (call $proc_exit (i32.const 10))))
      (if (i32.ne (i32.load (i32.const 192)) (i32.const 1)) (then (call $proc_exit (i32.const 11))))
      (if (i64.lt_u (local.get $slept) (i64.const 99000000)) (then (call $proc_exit (i32.const 12))))
      (if (i64.gt_u (local.get $slept) (i64.const 5000000000)) (then (call $proc_exit (i32.const 13)))))""",
    parts=_SLEEP,
)
"""Exits 0 when relative and absolute sleeps take the time that its own clock says."""

BAD_POLL: Final = _guest(
    "poll_oneoff proc_exit",
    """(func (export "_start")
      ;; no subscriptions, too many, and addresses outside of the memory: INVAL, INVAL, FAULT, FAULT
      (if (i32.ne (call $poll_oneoff (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)) (i32.const 28))
        (then (call $proc_exit (i32.const 1))))
      (if (i32.ne (call $poll_oneoff (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 0)) (i32.const 28))
        (then (call $proc_exit (i32.const 2))))
      (if (i32.ne (call $poll_oneoff (i32.const -16) (i32.const 0) (i32.const 1) (i32.const 0)) (i32.const 21))
        (then (call $proc_exit (i32.const 3))))
      (if (i32.ne (call $poll_oneoff (i32.const 64) (i32.const -8) (i32.const 1) (i32.const 0)) (i32.const 21))
        (then (call $proc_exit (i32.const 4)))))""",
)
"""Exits 0 when wrong arguments of poll_oneoff give errors."""

ASKER: Final = _guest(
    "poll_oneoff",
    '(func (export "_start") (loop $again (drop (call $sleep (i64.const 0))) (br $again)))',
    parts=_SLEEP,
)
"""Polls for no time at all, for ever: each call takes the interpreter from the daemon."""

STDIN: Final = _guest(
    "fd_read proc_exit",
    """(func (export "_start")
      (i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const 16))
      (call $proc_exit (i32.add
        (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)) (i32.load (i32.const 8)))))""",
)
"""Exits with errno plus the number of bytes that standard input had."""

IS_TERMINAL: Final = _guest(
    "fd_fdstat_get fd_write",
    """(func $kind (param $fd i32) (local $at i32)
      (local.set $at (i32.add (i32.const 1024) (local.get $fd)))
      (drop (call $fd_fdstat_get (local.get $fd) (i32.const 64)))
      (i32.store8 (local.get $at) (i32.add (i32.const 48) (i32.load8_u (i32.const 64)))))
    (func (export "_start")
      (call $kind (i32.const 0)) (call $kind (i32.const 1)) (call $kind (i32.const 2))
      (i32.store8 (i32.const 1027) (i32.const 10))
      (call $write (i32.const 1) (i32.const 1024) (i32.const 4)))""",
    parts=_WRITE,
)
"""Prints the file type of each standard stream, a digit each: 2 is a character device, which isatty(3) looks for."""

CAT: Final = _guest(
    "fd_read fd_write",
    """(data (i32.const 512) "ready\\n")
    (func (export "_start")
      (call $write (i32.const 1) (i32.const 512) (i32.const 6))
      (block $end (loop $next
        (i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const 4096))
        (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
        (br_if $end (i32.eqz (i32.load (i32.const 8))))
        (call $write (i32.const 1) (i32.const 1024) (i32.load (i32.const 8)))
        (br $next)))
      (call $write (i32.const 2) (i32.const 512) (i32.const 6)))""",
    parts=_WRITE,
)
"""Prints `ready`, copies standard input to standard output, and at its end prints `ready` on standard error."""

LIBRARY: Final = _guest(
    "fd_write",
    """(global $ready (mut i32) (i32.const 0))
    (data (i32.const 1024) "initialised\\n")
    (func (export "_initialize") (global.set $ready (i32.const 1)))
    (func (export "serve") (if (i32.eqz (global.get $ready)) (then unreachable))
      (call $write (i32.const 1) (i32.const 1024) (i32.const 12)))
    (func (export "needs") (param i32))""",
    parts=_WRITE,
)
"""No `_start`; `serve` works after `_initialize` only, `needs` takes a parameter."""

UNKNOWN_IMPORT: Final = '(module (import "env" "launch" (func)) (func (export "_start")))'
WASMEDGE_SOCKET: Final = (
    '(module (import "wasi_snapshot_preview1" "sock_connect" (func (param i32 i32 i32) (result i32)))'
    ' (func (export "_start")))'
)
STARTS_AT_ONCE: Final = (
    '(module (memory (export "memory") 1) (func $main unreachable) (start $main) (func (export "_start")))'
)
SHARED_MEMORY: Final = '(module (memory (export "memory") 1 2 shared) (func (export "_start")))'
TWO_MEMORIES: Final = '(module (memory 1) (memory 1) (func (export "_start")))'


EXITS_WITH_ARGC: Final = _guest(
    "args_sizes_get poll_oneoff proc_exit",
    """(func (export "_start")
      (drop (call $args_sizes_get (i32.const 16) (i32.const 20)))
      (drop (call $sleep (i64.const 50000000)))
      (call $proc_exit (i32.load (i32.const 16))))""",
    parts=_SLEEP,
)
"""Sleeps for 50 ms and exits with the number of its arguments, argv[0] included."""

PROGRAMS: Final = {
    "exit": _guest(
        "args_sizes_get args_get fd_write proc_exit",
        """(func (export "_start") (call $arguments)
          (call $proc_exit (call $number (i32.load (i32.const 1028)))))""",
        parts=_WRITE + _STRINGS + _ARGUMENTS,
    ),
    "say": _guest(
        "args_sizes_get args_get fd_write",
        """(func (export "_start") (call $arguments)
          (call $line (i32.const 1) (i32.const 0) (i32.const 0) (i32.load (i32.const 1028)))
          (call $line (i32.const 2) (i32.const 0) (i32.const 0) (i32.load (i32.const 1032))))""",
        parts=_WRITE + _STRINGS + _ARGUMENTS,
    ),
    "reveal": _guest(
        "args_sizes_get args_get environ_sizes_get environ_get fd_write",
        """(func (export "_start") (call $arguments)
          (call $lines (i32.const 32) (i32.const 1028) (i32.sub (i32.load (i32.const 16)) (i32.const 1)))
          (drop (call $environ_sizes_get (i32.const 16) (i32.const 20)))
          (drop (call $environ_get (i32.const 1024) (i32.const 8192)))
          (call $lines (i32.const 36) (i32.const 1024) (i32.load (i32.const 16))))""",
        parts=_WRITE + _STRINGS + _ARGUMENTS,
    ),
    "wait": _guest(
        "fd_write poll_oneoff",
        """(func (export "_start") (call $write (i32.const 1) (i32.const 41) (i32.const 6))
          (loop $again (drop (call $sleep (i64.const 3600000000000))) (br $again)))""",
        parts=_WRITE + _STRINGS + _SLEEP,
    ),
    "count": _guest(
        "fd_write poll_oneoff",
        """(func (export "_start") (local $number i32)
          (loop $again
            (call $line (i32.const 1) (i32.const 0) (i32.const 0) (call $digits (local.get $number)))
            (drop (call $sleep (i64.const 20000000)))
            (local.set $number (i32.add (local.get $number) (i32.const 1)))
            (br $again)))""",
        parts=_WRITE + _STRINGS + _SLEEP + _DIGITS,
    ),
}
"""`exit CODE`; `say OUT ERR`; `reveal WORD...` prints `arg WORD` and `env NAME=VALUE`; `wait`; `count`."""


COMPONENT_IMPORTS: Final = """(import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $p (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $p))))))
  (alias export $poll "pollable" (type $pollable))
  (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
    (alias outer 1 $pollable (type $p)) (export "pollable" (type $p2 (eq $p)))
    (export "subscribe-duration" (func (param "when" u64) (result (own $p2))))))
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (alias export $error "error" (type $err))"""
"""What components of these tests import first: `$poll`, `$clock` and `$error`."""


def component(run: str) -> str:
    """A command component (WASI 0.2) whose `wasi:cli/run` is the body of a function with an i32 result, 0 for ok.

    It may call `$say`, which prints one line, and `$wait`, which sleeps for an hour.
    """
    return f"""(component
      {COMPONENT_IMPORTS}
      (import "wasi:io/streams@0.2.0" (instance $streams
        (export "output-stream" (type $os (sub resource)))
        (alias outer 1 $err (type $e)) (export "error" (type $e2 (eq $e)))
        (type $se (variant (case "last-operation-failed" (own $e2)) (case "closed")))
        (export "stream-error" (type $se2 (eq $se)))
        (export "[method]output-stream.blocking-write-and-flush"
          (func (param "self" (borrow $os)) (param "contents" (list u8)) (result (result (error $se2)))))))
      (alias export $streams "output-stream" (type $os))
      (import "wasi:cli/stdout@0.2.0" (instance $stdout
        (alias outer 1 $os (type $o)) (export "output-stream" (type $o2 (eq $o)))
        (export "get-stdout" (func (result (own $o2))))))
      (core module $libc (memory (export "memory") 1)
        (func (export "realloc") (param i32 i32 i32 i32) (result i32) i32.const 4096))
      (core instance $libc (instantiate $libc))
      (core func $get (canon lower (func $stdout "get-stdout")))
      (core func $write (canon lower (func $streams "[method]output-stream.blocking-write-and-flush")
        (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
      (core func $subscribe (canon lower (func $clock "subscribe-duration")))
      (core func $block (canon lower (func $poll "[method]pollable.block")))
      (core module $main
        (import "libc" "memory" (memory 1))
        (import "wasi" "get" (func $get (result i32)))
        (import "wasi" "write" (func $write (param i32 i32 i32 i32)))
        (import "wasi" "subscribe" (func $subscribe (param i64) (result i32)))
        (import "wasi" "block" (func $block (param i32)))
        (data (i32.const 100) "hello from a component\\0a")
        (func $say (call $write (call $get) (i32.const 100) (i32.const 23) (i32.const 0)))
        (func $wait (call $block (call $subscribe (i64.const 3600000000000))))
        (func (export "run") (result i32) {run}))
      (core instance $main (instantiate $main
        (with "libc" (instance $libc))
        (with "wasi" (instance (export "get" (func $get)) (export "write" (func $write))
          (export "subscribe" (func $subscribe)) (export "block" (func $block))))))
      (func $run (result (result)) (canon lift (core func $main "run")))
      (instance $exported (export "run" (func $run)))
      (export "wasi:cli/run@0.2.0" (instance $exported)))"""


COMPONENT_FUNCTIONS: Final = """(component
  (core module $m (func (export "none")) (func (export "zero") (result i32) i32.const 0)
    (func (export "one") (result i32) i32.const 1) (func (export "takes") (param i32)))
  (core instance $i (instantiate $m))
  (func $nothing (canon lift (core func $i "none")))
  (func $works (result (result)) (canon lift (core func $i "zero")))
  (func $fails (result (result)) (canon lift (core func $i "one")))
  (func $gives (result u32) (canon lift (core func $i "one")))
  (func $takes (param "a" u32) (canon lift (core func $i "takes")))
  (export "nothing" (func $nothing)) (export "works" (func $works)) (export "fails" (func $fails))
  (export "gives" (func $gives)) (export "takes" (func $takes))
  (instance $run (export "run" (func $works))) (export "wasi:cli/run@0.2.0" (instance $run)))"""
"""Beside `wasi:cli/run` functions of its own."""


GREETER: Final = _guest(
    "sock_accept fd_fdstat_set_flags fd_close fd_write",
    """(data (i32.const 1024) "listening\\n") (data (i32.const 1100) "hello from wasm\\n")
    (func (export "_start") (local $errno i32)
      (drop (call $fd_fdstat_set_flags (i32.const 3) (i32.const 0)))
      (call $write (i32.const 1) (i32.const 1024) (i32.const 10))
      (loop $next
        (local.set $errno (call $sock_accept (i32.const 3) (i32.const 0) (i32.const 16)))
        (if (i32.eqz (local.get $errno)) (then
          (call $write (i32.load (i32.const 16)) (i32.const 1100) (i32.const 16))
          (drop (call $fd_close (i32.load (i32.const 16))))
          (br $next)))))""",
    parts=_WRITE,
)
"""Waits for connections on its first listener and writes a line to each, until it is closed."""


def exits(code: int) -> str:
    """Calls `proc_exit(code)`, and would print if that returned."""
    return _guest(
        "proc_exit fd_write",
        f"""(data (i32.const 1024) "still here\\n")
        (func (export "_start") (call $proc_exit (i32.const {code}))
          (call $write (i32.const 1) (i32.const 1024) (i32.const 11)))""",
        parts=_WRITE,
    )


def floods(lines: int) -> str:
    """Prints a line of 100 bytes so many times; 0 = until it is stopped."""
    text = "x" * 99 + "\\n"
    return _guest(
        "fd_write",
        f"""(data (i32.const 1024) "{text}")
        (func (export "_start") (local $left i32) (local.set $left (i32.const {lines}))
          (loop $next
            (call $write (i32.const 1) (i32.const 1024) (i32.const 100))
            (local.set $left (i32.sub (local.get $left) (i32.const 1)))
            (br_if $next (local.get $left))))""",
        parts=_WRITE,
    )


def counts(last: int) -> str:
    """Prints the numbers from 1 to `last`, a line each, as fast as it can."""
    return _guest(
        "fd_write",
        f"""(func (export "_start") (local $number i32)
          (loop $next
            (local.set $number (i32.add (local.get $number) (i32.const 1)))
            (call $line (i32.const 1) (i32.const 0) (i32.const 0) (call $digits (local.get $number)))
            (br_if $next (i32.lt_u (local.get $number) (i32.const {last})))))""",
        parts=_WRITE + _STRINGS + _DIGITS,
    )


def writes_file(directory_fd: int, name: str, text: str) -> str:
    """Creates a file in a preopened directory (descriptors count from 3) and writes to it; exits with the errno."""
    return _guest(
        "path_open fd_write fd_close proc_exit",
        f"""(data (i32.const 1024) "{name}") (data (i32.const 2048) "{text}")
        (func (export "_start") (local $errno i32)
          (local.set $errno (call $path_open (i32.const {directory_fd}) (i32.const 0)
            (i32.const 1024) (i32.const {len(name)}) (i32.const 9)
            (i64.const 64) (i64.const 64) (i32.const 0) (i32.const 32)))
          (if (local.get $errno) (then (call $proc_exit (local.get $errno))))
          (call $write (i32.load (i32.const 32)) (i32.const 2048) (i32.const {len(text)}))
          (drop (call $fd_close (i32.load (i32.const 32)))))""",
        parts=_WRITE,
    )


def prints_file(directory_fd: int, name: str) -> str:
    """Prints up to 4 KiB of a file in a preopened directory; exits with the errno."""
    return _guest(
        "path_open fd_read fd_write proc_exit",
        f"""(data (i32.const 1024) "{name}")
        (func (export "_start") (local $errno i32)
          (local.set $errno (call $path_open (i32.const {directory_fd}) (i32.const 1)
            (i32.const 1024) (i32.const {len(name)}) (i32.const 0)
            (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 32)))
          (if (local.get $errno) (then (call $proc_exit (local.get $errno))))
          (i32.store (i32.const 0) (i32.const 4096)) (i32.store (i32.const 4) (i32.const 4096))
          (drop (call $fd_read (i32.load (i32.const 32)) (i32.const 0) (i32.const 1) (i32.const 40)))
          (call $write (i32.const 1) (i32.const 4096) (i32.load (i32.const 40))))""",
        parts=_WRITE,
    )


def long_module(steps: int) -> bytes:
    """A module whose compilation takes a second of CPU for each 120,000 steps or so; in binary, as text is slow."""
    step = b"\x20\x00\x41\x07\x6a\x21\x00"  # local.get 0, i32.const 7, i32.add, local.set 0
    bodies = [b"\x00" + step * 1000 + b"\x0b"] * (steps // 1000)
    code = b"".join(leb(len(body)) + body for body in bodies)
    sections = {
        1: b"\x01\x60\x01\x7f\x00",  # one type: (i32) -> ()
        3: leb(len(bodies)) + bytes(len(bodies)),
        10: leb(len(bodies)) + code,
    }
    return b"\0asm\x01\0\0\0" + b"".join(bytes([kind]) + leb(len(body)) + body for kind, body in sections.items())


def leb(number: int) -> bytes:
    """LEB128, as the format has all its numbers."""
    low = number & 0x7F
    return bytes([low]) if number == low else bytes([low | 0x80]) + leb(number >> 7)


@functools.lru_cache(maxsize=64)
def assemble(text: str) -> bytes:
    """The binary of a module in Wasm text."""
    import wasmtime  # noqa: PLC0415  tests that need no guest do not load the engine

    return bytes(wasmtime.wat2wasm(text))
