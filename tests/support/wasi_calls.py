"""Guests that call WASI preview 1 at random: every function, with what fits, and now and then with anything.

`random_calls(seeded(), 200)` is the text of one. The engine traps at the first address that is outside of the memory,
so that what does not fit is rare: a guest gets far, and ends in a way of its own. Source: the WASI preview 1 witx.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Final

_PAGES: Final = 2
_SIZE: Final = _PAGES << 16
_PATHS: Final = (
    *(b".", b"..", b"file", b"made", b"directory/file", b"directory", b"link", b"loop", b"/", b"/etc/passwd", b""),
    *(b"directory/../../x", b"a" * 300, b"b/" * 2000, b"\xff\xfe", b"nul\0nul", "ünï".encode(), b"pipe/nothing"),
)
_PATHS_AT: Final = 0x1000
_VECTORS: Final = ((0x8000, 0), (0x8000, 1), (0x8000, 100), (0x8100, 4096), (0x9000, 0x7000), (0, _SIZE), (0x100, 64))
"""Buffers; some of them lie over these vectors."""
_VECTORS_AT: Final = 0x100
_CLOCKS_AT: Final = 0x400
"""Subscriptions of `poll_oneoff`: clocks and descriptors."""
_OUT: Final = 0x6000
_EXTREMES: Final = (0, 1, 3, 0xFFFF, _SIZE - 4, _SIZE, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF8, 0xFFFFFFFF)
_LONG_EXTREMES: Final = (0, 1, 4096, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_RIGHTS: Final = (0, 2, 64, 66, 0x1FFFFFFF)

_CALLS: Final[Mapping[str, str]] = {
    "args_get": "out out",
    "args_sizes_get": "out out",
    "environ_get": "out out",
    "environ_sizes_get": "out out",
    "clock_res_get": "clock out",
    "clock_time_get": "clock long out",
    "fd_advise": "fd long long advice",
    "fd_allocate": "fd long long",
    "fd_close": "far",
    "fd_datasync": "fd",
    "fd_fdstat_get": "fd out",
    "fd_fdstat_set_flags": "fd flags",
    "fd_fdstat_set_rights": "fd rights rights",
    "fd_filestat_get": "fd out",
    "fd_filestat_set_size": "fd long",
    "fd_filestat_set_times": "fd long long bits",
    "fd_pread": "fd vector few long out",
    "fd_prestat_get": "fd out",
    "fd_prestat_dir_name": "fd out length",
    "fd_pwrite": "fd vector few long out",
    "fd_read": "fd vector few out",
    "fd_readdir": "fd out length long out",
    "fd_renumber": "far far",
    "fd_seek": "fd long whence out",
    "fd_sync": "fd",
    "fd_tell": "fd out",
    "fd_write": "fd vector few out",
    "path_create_directory": "fd path",
    "path_filestat_get": "fd follow path out",
    "path_filestat_set_times": "fd follow path long long bits",
    "path_link": "fd follow path fd path",
    "path_open": "fd follow path bits rights rights flags out",
    "path_readlink": "fd path out length out",
    "path_remove_directory": "fd path",
    "path_rename": "fd path fd path",
    "path_symlink": "path fd path",
    "path_unlink_file": "fd path",
    "poll_oneoff": "clocks out few out",
    "random_get": "out length",
    "sched_yield": "",
    "sock_accept": "fd flags out",
    "sock_recv": "fd vector few follow out out",
    "sock_send": "fd vector few none out",
    "sock_shutdown": "fd way",
}
_LONG: Final = frozenset({"long", "rights"})
_TWO: Final = frozenset({"path"})


def random_calls(generator: random.Random, number: int, *, wild: float = 0.001) -> str:
    """A guest that makes so many calls, then the last one for ever; `wild`: how often an argument is anything."""
    calls = [_call(generator, generator.choice(tuple(_CALLS)), wild) for _ in range(number)]
    # One function for each hundred: what one function may hold on its stack is not what is tried out here.
    parts = [calls[at : at + 100] for at in range(0, number, 100)]
    functions = "".join(f"(func $part{index} {' '.join(part)})" for index, part in enumerate(parts))
    run = " ".join(f"(call $part{index})" for index in range(len(parts)))
    return f"""(module {" ".join(map(_imported, _CALLS))}
      (memory (export "memory") {_PAGES} {_PAGES * 4}) {_data()} {functions}
      (func (export "_start") {run} (loop $again {calls[-1]} (br $again))))"""


def _imported(name: str) -> str:
    parameters = " ".join(
        "i64" if kind in _LONG else "i32 i32" if kind in _TWO else "i32" for kind in _CALLS[name].split()
    )
    return f'(import "wasi_snapshot_preview1" "{name}" (func ${name} (param {parameters}) (result i32)))'


def _call(generator: random.Random, name: str, wild: float) -> str:
    arguments = " ".join(_argument(generator, kind, wild) for kind in _CALLS[name].split())
    return f"(drop (call ${name} {arguments}))"


def _argument(generator: random.Random, kind: str, wild: float) -> str:
    if kind in _LONG:
        return f"(i64.const {generator.choice(_RIGHTS if kind == 'rights' else _LONG_EXTREMES)})"
    values: tuple[int, ...] = _path(generator) if kind in _TWO else (_FITTING[kind](generator),)
    if generator.random() < wild:
        values = tuple(generator.choice(_EXTREMES) for _ in values)
    return " ".join(f"(i32.const {value})" for value in values)


def _path(generator: random.Random) -> tuple[int, int]:
    index = generator.randrange(len(_PATHS))
    return _PATHS_AT + sum(map(len, _PATHS[:index])), len(_PATHS[index])


_FITTING: Final[Mapping[str, Callable[[random.Random], int]]] = {
    # Descriptors 1 and 2 are the log, 3 is the directory, or a listener, and the next ones are what has been opened.
    "fd": lambda random: random.choice((1, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6, 7, 8, 65536, 65537, 0xFFFFFFFF)),
    "far": lambda random: random.choice((6, 7, 8, 9, 10, 65536, 65537, 0x7FFFFFFF, 0xFFFFFFFF)),
    "out": lambda random: _OUT + random.randrange(0, 0x1000, 8),
    "length": lambda random: random.choice((0, 1, 24, 25, 100, 4096, 0x8000)),
    "vector": lambda random: _VECTORS_AT + 8 * random.randrange(len(_VECTORS)),
    "few": lambda random: random.choice((0, 1, 1, 1, 2, 3)),
    # Of enumerations and flags only what there is: anything else is a trap.
    "clock": lambda random: random.choice((0, 1, 1, 2, 3)),
    "advice": lambda random: random.randrange(6),
    "whence": lambda random: random.randrange(3),
    "follow": lambda random: random.randrange(2),
    "way": lambda random: random.randrange(1, 4),
    "bits": lambda random: random.choice((0, 0, 1, 1, 2, 4, 5, 8, 9, 15)),
    "none": lambda random: 0,
    "clocks": lambda random: _CLOCKS_AT + 48 * random.randrange(4),
    "flags": lambda random: random.choice((0, 0, 1, 4, 5, 31)),
}


def _data() -> str:
    vectors = b"".join(at.to_bytes(4, "little") + size.to_bytes(4, "little") for at, size in _VECTORS)
    clocks = b"".join(
        (7).to_bytes(8, "little") + bytes((tag,)) + bytes(7) + first.to_bytes(8, "little") + then.to_bytes(24, "little")
        # At once, in a millisecond, absolute and long ago, to be read, to be written, of no kind.
        for tag, first, then in (
            (0, 1, 0),
            (0, 0, 1_000_000),
            (0, 1, 1 << 128),
            (1, 3, 0),
            (2, 65536, 0),
            (0, 9, 0),
            (9, 0, 0),
        )
    )
    placed = ((_VECTORS_AT, vectors), (_CLOCKS_AT, clocks), (_PATHS_AT, b"".join(_PATHS)))
    return " ".join(f'(data (i32.const {at}) "{_escaped(data)}")' for at, data in placed)


def _escaped(data: bytes) -> str:
    return "".join(f"\\{byte:02x}" for byte in data)
