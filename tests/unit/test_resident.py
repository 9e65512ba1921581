"""How much of a mapping is in memory."""

from __future__ import annotations

import ctypes
import mmap

from cri_shim.kernel import libc

PAGE = mmap.PAGESIZE


def test_only_pages_that_were_touched_count() -> None:
    with mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        start = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(start)
        assert libc.resident(address, 64 * PAGE) == 0
        for number in (0, 7, 63):
            memory[number * PAGE] = 1
        assert libc.resident(address, 64 * PAGE) == 3 * PAGE
        assert libc.resident(address + 7 * PAGE + 5, 10) == 10
        assert libc.resident(address, 0) == 0
        del start


def test_what_is_not_mapped_is_not_there() -> None:
    assert libc.resident(PAGE, 4 * PAGE) == 0
