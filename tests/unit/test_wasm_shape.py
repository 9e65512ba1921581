"""What a module keeps data in, and how its limit is shared out among that."""

from __future__ import annotations

import pytest
import wasmtime
from hypothesis import given
from hypothesis import strategies as st

from cri_shim.wire.wasm_shape import UNKNOWN, Shape, Table, parse_shape
from handlers.wasmtime.memory_budget import budget
from tests.support import hostile, wasm

STRUCT = "(type (struct (field i32)))"


def shape(has_memory: bool = True, tables: tuple[Table, ...] = (), collects: bool = True) -> Shape:
    """Of a module that opens no files."""
    return Shape(has_memory, tables, collects, opens_files=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(module)", shape(has_memory=False, collects=False)),
        (wasm.HELLO, shape(collects=False)),
        ("(module (table 3 funcref) (table 5 9 externref))", shape(False, (Table(3), Table(5, 9)), False)),
        ("(module (memory 1) (table 300000 300000 funcref))", shape(True, (Table(300000, 300000),), False)),
        (f"(module {STRUCT})", shape(has_memory=False)),
        (f"(module (rec (type (func)) {STRUCT}))", shape(has_memory=False)),
        ("(module (type (sub final (array (mut i8)))))", shape(has_memory=False)),
        ("(module (type (sub (func (param i32)))))", shape(has_memory=False, collects=False)),
        ("(module (type $f (func)) (type (func (param (ref null $f)))))", shape(has_memory=False, collects=False)),
        ("(module (tag (param i32)) (memory 1))", shape()),
        (wasm.prints_file(3, "x"), Shape(collects=False)),
        ("(module (table 2 (ref func) (ref.func $f)) (func $f))", Shape()),
    ],
)
def test_shapes(text: str, expected: Shape) -> None:
    assert parse_shape(bytes(wasmtime.wat2wasm(text))) == expected


@given(st.binary(max_size=64))
def test_any_bytes_have_a_shape(tail: bytes) -> None:
    parse_shape(b"\0asm\1\0\0\0" + tail)


def test_what_is_cut_short_may_use_all() -> None:
    whole = bytes(wasmtime.wat2wasm(wasm.HELLO))
    assert parse_shape(whole[:12]) == UNKNOWN


def test_what_describes_a_module_is_weighed() -> None:
    """Code, data and what is custom do not count; what is large is not looked at."""
    module = bytes(wasmtime.wat2wasm(wasm.HELLO))
    small = parse_shape(module).description
    assert 0 < small < 2000
    custom = b"\0" + wasm.leb(1 << 20) + b"\1x" + bytes((1 << 20) - 2)
    assert parse_shape(module + custom).description == small
    assert parse_shape(hostile.described("types", 1000)).description > 8 * 23_000
    assert parse_shape(hostile.described("exports", 1000)).description > 8 * 10_000
    assert parse_shape(hostile.described("types", 3000)).collects
    assert parse_shape(module + b"\0\1\0" * 2000).description == len(module) + 6000
    assert parse_shape(module[:8] + b"\4" + wasm.leb(1 << 10) + wasm.leb(1 << 9) + bytes(1022)) == UNKNOWN


TABLES = st.lists(
    st.builds(
        lambda low, more: Table(low, None if more is None else low + more),
        st.integers(0, 1 << 20),
        st.none() | st.integers(0, 1 << 24),
    ),
    max_size=4,
)


@given(st.integers(1 << 16, 1 << 34), st.booleans(), st.booleans(), TABLES)
def test_all_of_it_together_stays_within_the_limit(
    limit: int, has_memory: bool, collects: bool, tables: list[Table]
) -> None:
    shape = Shape(has_memory, tuple(tables), collects)
    found = budget(limit, shape)
    largest = [min(found.elements, limit if table.maximum is None else table.maximum) for table in tables]
    if all(table.minimum <= found.elements for table in tables):  # or it is not instantiated
        assert (has_memory + collects) * found.memory + 8 * sum(largest) <= max(limit, 8 * sum(largest))
    if not tables and has_memory + collects < 2:
        assert found.memory == limit


def test_what_usual_modules_get() -> None:
    go = Shape(True, (Table(3000),), collects=False)
    assert budget(10 << 20, go).memory >= (10 << 20) * 15 // 16
    rust = Shape(True, (Table(200, 200),), collects=False)
    assert budget(10 << 20, rust).memory == (10 << 20) - 1600
    assert budget(0, rust).memory == -1
