"""Modules that are made to note what they were refused: they do what they did, and the note is right."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st

from cri_shim.wire.wasm_addresses import Addresses, as_it_came
from cri_shim.wire.wasm_binary import HEADER, Reader, leb, signed_leb
from cri_shim.wire.wasm_code import END, skip_instruction, skip_locals
from cri_shim.wire.wasm_growth import note_refusals
from handlers.wasmtime.compile import write_compiled
from handlers.wasmtime.engine import new_engine
from handlers.wasmtime.native import NativeModule
from handlers.wasmtime.refusal_note import RefusalNote, read_note
from tests.support import hostile, wasm
from tests.support.scale import count, seeded

LIMIT: Final = 20
"""Pages."""
ELEMENTS: Final = 1000
CODE: Final = 10


def assembled(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


def noting(text: str | bytes) -> bytes:
    module = note_refusals(assembled(text) if isinstance(text, str) else text, "note", "start")
    assert module is not None
    return module


class Instance:
    """A module in a store with limits, and what it is called by."""

    def __init__(self, module: bytes) -> None:
        engine = new_engine()
        self.store = wasmtime.Store(engine)
        self.store.set_epoch_deadline(1)
        self.store.set_limits(memory_size=LIMIT << 16, table_elements=ELEMENTS)
        self.module = wasmtime.Module(engine, module)
        self.exports = wasmtime.Instance(self.store, self.module, []).exports(self.store)

    def call(self, name: str, *arguments: int) -> int:
        function = self.exports[name]
        assert isinstance(function, wasmtime.Func)
        return int(function(self.store, *arguments) or 0)

    def trap(self, name: str) -> str:
        with pytest.raises(wasmtime.Trap) as caught:
            self.call(name)
        return str(caught.value)

    @property
    def note(self) -> int:
        found = next(item for name, item in self.exports.items() if name.startswith("note "))
        assert isinstance(found, wasmtime.Global)
        return int(found.value(self.store))

    @property
    def addresses(self) -> Addresses:
        return Addresses.parse(self.module.exports[-1].name.removeprefix("note "))


# Instructions.

WITH_OPERANDS: Final = """
unreachable; nop; block end; block (result i32) end; block (type 200) end; loop end; if else end; block (result (ref
null 200)) end; block (result (ref func)) end; throw 200; throw_ref; br 3; br_if 300; br_table 1; br_table 1 2 300 4;
return; call 200; call_indirect 1 (type 200); return_call 300; return_call_indirect (type 2); call_ref 200;
return_call_ref 2; drop; select; select (result i32); select (result (ref null 200)); try_table end; try_table (result
i32) (catch 1 200) (catch_ref 1 2) (catch_all 200) (catch_all_ref 3) end; local.get 300; local.set 3; local.tee 3;
global.get 200; global.set 2; table.get 200; table.set 0; i32.load offset=70000 align=1; i64.load32_u; i32.store8
offset=4294967295; f64.store; i64.load offset=0x1000000000; memory.size; memory.grow; i32.const -1; i32.const
0x7fffffff; i64.const -0x8000000000000000; i64.const 64; f32.const 1.5; f64.const nan; i32.eqz; i32.add;
i64.extend32_s; f64.reinterpret_i64; ref.null func; ref.null 200; ref.null none; ref.is_null; ref.func 200; ref.eq;
ref.as_non_null; br_on_null 200; br_on_non_null 1; struct.new 200; struct.new_default 1; struct.get 200 300;
struct.get_s 1 1; struct.get_u 1 1; struct.set 1 200; array.new 200; array.new_default 1; array.new_fixed 200 300;
array.new_data 1 200; array.new_elem 1 200; array.get 200; array.get_s 1; array.get_u 1; array.set 1; array.len;
array.fill 200; array.copy 200 300; array.init_data 1 200; array.init_elem 1 200; ref.test (ref 200); ref.test (ref
null any); ref.cast (ref i31); ref.cast (ref null 200); br_on_cast 300 (ref null any) (ref 200); br_on_cast_fail 1
(ref null any) (ref null i31); any.convert_extern; extern.convert_any; ref.i31; i31.get_s; i31.get_u;
i32.trunc_sat_f32_s; i64.trunc_sat_f64_u; memory.init 200; data.drop 200; memory.copy; memory.fill; table.init 1 200;
elem.drop 200; table.copy 1 200; table.grow 200; table.size 200; table.fill 1; i64.add128; i64.sub128; i64.mul_wide_s;
i64.mul_wide_u; v128.load offset=70000; v128.load64_splat; v128.store; v128.const i64x2 0x400040004000 11;
i8x16.swizzle; i8x16.splat; i8x16.shuffle 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 64; f64x2.splat; i8x16.extract_lane_s 11;
f64x2.replace_lane 1; i8x16.eq; v128.not; v128.any_true; v128.load8_lane 11; v128.load64_lane offset=70000 1;
v128.store8_lane 3; v128.store64_lane 0; v128.load32_zero; v128.load64_zero offset=200; f32x4.demote_f64x2_zero;
i8x16.abs; i64x2.extmul_high_i32x4_u; f64x2.div; f64x2.convert_low_i32x4_u; i8x16.relaxed_swizzle; f32x4.relaxed_madd;
i32x4.relaxed_dot_i8x16_i7x16_add_s"""


def code(module: bytes) -> tuple[int, Reader]:
    """How many functions there are, and what reads them."""
    reader = Reader(module, HEADER)
    while True:
        kind, content = reader.section()
        if kind == CODE:
            return content.number(), content


@pytest.mark.parametrize("instruction", [" ".join(each.split()) for each in WITH_OPERANDS.split(";")])
def test_each_instruction_is_read_to_its_end(instruction: str) -> None:
    """A text is not checked by who assembles it: any numbers will do."""
    number, reader = code(assembled(f"(module (func (local i64 (ref null 200)) {instruction}))"))
    assert number == 1
    reader.number()
    skip_locals(reader)
    opening = instruction.split(maxsplit=1)[0] in {"block", "loop", "if", "try_table"}
    expected = [END] * (2 if opening else 1)
    skip_instruction(reader)
    found = [skip_instruction(reader) for _ in range(len(expected) + ("else" in instruction))]
    assert (found[-len(expected) :], reader.at) == (expected, reader.end)


def test_opcodes_that_are_not_known_are_not_guessed() -> None:
    for wrong in (
        b"\x06\x40",
        b"\x27",
        b"\xc5",
        b"\xfb\x20",
        b"\xfc\x12",
        b"\xfd\x94\x02",
        b"\xfe\x03\0",
        b"\x28\x40\0\0",
    ):
        with pytest.raises(ValueError, match=r"\d"):
            skip_instruction(Reader(wrong, 0))
    with pytest.raises(IndexError):
        skip_instruction(Reader(b"\x1f\x40\1\4\0", 0))


@given(st.integers(0, (1 << 64) - 1), st.integers(-(1 << 63), (1 << 63) - 1))
def test_numbers_are_written_as_they_are_read(unsigned: int, signed: int) -> None:
    assert Reader(leb(unsigned), 0).number() == unsigned
    text = f"(module (func i64.const {signed}))"
    assert assembled(text).endswith(b"\x42" + signed_leb(signed) + b"\x0b")


# What the note says.

PLACES: Final = {
    "memory": ("i32", '(memory (export "place") 1)', "memory.grow (local.get 0)", 1 << 16, 1 << 16),
    "memory, maximum": ("i32", '(memory (export "place") 1 30)', "memory.grow (local.get 0)", 1 << 16, 30),
    "memory of 64 bits": ("i64", '(memory (export "place") i64 1)', "memory.grow (local.get 0)", 1 << 16, 1 << 31),
    "table": (
        "i32",
        '(table 3 externref) (table (export "place") 10 funcref)',
        "table.grow 1 (ref.null func) (local.get 0)",
        8,
        (1 << 32) - 1,
    ),
    "table, maximum": (
        "i32",
        '(table (export "place") 10 1500 externref)',
        "table.grow 0 (ref.null extern) (local.get 0)",
        8,
        1500,
    ),
    "table of 64 bits": (
        "i64",
        '(table (export "place") i64 10 anyref)',
        "table.grow 0 (ref.i31 (i32.const 1)) (local.get 0)",
        8,
        1 << 44,
    ),
    "table with a value": (
        "i32",
        '(type $f (func)) (func $f) (elem declare func $f) (table (export "place") 10 (ref $f) (ref.func $f))',
        "table.grow 0 (ref.func $f) (local.get 0)",
        8,
        (1 << 32) - 1,
    ),
}


def grows(place: str) -> tuple[str, int, int]:
    kind, declared, growth, unit, most = PLACES[place]
    text = f"""(module (func) {declared}
      (func (export "grow") (param {kind}) (result {kind}) ({growth})))"""
    return text, unit, most


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=count(500, 25))
@given(data=st.data())
def test_growth_is_what_it_was_and_refusals_are_noted(place: str, data: st.DataObject) -> None:
    text, unit, most = grows(place)
    limit = LIMIT if "memory" in place else ELEMENTS
    before, after = Instance(assembled(text)), Instance(noting(text))
    size, note = 1 if "memory" in place else 10, 0
    sizes = st.one_of(st.integers(0, 3), st.integers(0, 2 * limit), st.integers(0, (1 << 32) - 1))
    for by in data.draw(st.lists(sizes, max_size=12)):
        result = after.call("grow", wrapped(by, place))
        assert result == before.call("grow", wrapped(by, place))
        if result == -1:
            note = by * unit if by <= most - size else note
        else:
            size += by
            note = 0 if 2 * by * unit >= note else note
        assert after.note == note
    assert size <= limit


def wrapped(value: int, place: str) -> int:
    """As the engine's Python interface takes it."""
    return value - (1 << 32) if value >= 1 << 31 and "64" not in place else value


def test_nothing_is_noted_by_what_does_not_grow() -> None:
    assert note_refusals(assembled(wasm.HELLO), "note", "start") is None
    assert (
        note_refusals(assembled("(module (memory 1) (func (drop (i64.const 0x40)) block unreachable end))"), "n", "s")
        is None
    )
    assert (
        note_refusals(
            assembled('(module (import "a" "m" (memory 1)) (func (drop (memory.grow (i32.const 1)))))'), "n", "s"
        )
        is None
    )
    many = "(drop (memory.grow (i32.const 1)))" * 1001
    assert note_refusals(assembled(f"(module (memory 1) (func {many}))"), "note", "start") is None


def test_what_only_looks_like_growth_is_left_alone() -> None:
    text = """(module (memory (export "memory") 1) (func (export "number") (result i64)
      (drop (memory.grow (i32.const 1))) block end (i64.const 0x1f8040)
      (drop (v128.const i32x4 0x400040 64 0xffc0f 0xfc))))"""
    for module in (assembled(text), noting(text)):
        instance = Instance(module)
        assert instance.call("number") == 0x1F8040


def test_nothing_that_the_module_has_changes_its_number() -> None:
    """With imports, globals and exports of its own, a start function, segments, names, and no section left out."""
    text = """(module $named (type (func)) (rec (type $s (struct (field i8))) (type (sub (array (mut i64)))))
      (import "a" "f" (func (param i32))) (import "a" "g" (global i32)) (import "a" "t" (tag (param i32)))
      (table 4 funcref) (memory 1) (tag (param i64)) (global $g (mut i32) (i32.const 7)) (export "global" (global $g))
      (export "grow" (func $grow)) (start $start) (elem (i32.const 0) func $grow $start) (data (i32.const 8) "data")
      (func $start (global.set $g (call_indirect (result i32) (i32.const 0)))
        (memory.init 0 (i32.const 0) (i32.const 0) (i32.const 0)))
      (func $grow (result i32) (memory.grow (i32.const 3))) (@custom "own" "bytes"))"""
    before, after = assembled(text), noting(text)
    engine = new_engine()
    modules = wasmtime.Module(engine, before), wasmtime.Module(engine, after)
    names = [[(item.name, type(item.type)) for item in module.exports] for module in modules]
    assert names[1][:-1] == [*names[0], ("start", wasmtime.FuncType)]
    assert [item.name for item in modules[0].imports] == [item.name for item in modules[1].imports]
    assert after.endswith(before[before.index(b"data") :])


def test_a_start_function_does_what_it_did_when_it_is_called() -> None:
    """Which is after the segments are in the memory; what it is refused can be read whatever becomes of it."""
    text = """(module (memory 1) (data (i32.const 0) "\\05") (global $g (export "g") (mut i32) (i32.const 7)) {start}
      (func $begin (param i32) (global.set $g (i32.add (i32.load8_u (i32.const 0)) (memory.grow (local.get 0)))) {ends})
      (func $start (call $begin (i32.const {pages}))))"""
    fits = text.format(start="(start $start)", ends="", pages=3)
    before, after = Instance(assembled(fits)), Instance(noting(fits))
    assert (value(before, "g"), value(after, "g")) == (6, 7)
    after.call("start")
    assert (value(after, "g"), after.note) == (6, 0)
    too_much = Instance(noting(text.format(start="(start $start)", ends="unreachable", pages=100)))
    assert "unreachable" in too_much.trap("start")
    assert (value(too_much, "g"), too_much.note) == (4, 100 << 16)
    without = Instance(noting(text.format(start="", ends="", pages=1)))
    assert "start" not in [export.name for export in without.module.exports]


def value(instance: Instance, name: str) -> int:
    found = instance.exports[name]
    assert isinstance(found, wasmtime.Global)
    return int(found.value(instance.store))


# Backtraces.

TRAPS: Final = """(module (memory (export "memory") 1) (func $deep (result i32) unreachable)
  (func $grows (param i32) (result i32) (drop (memory.grow (i32.const 1))) (drop (memory.grow (i32.const 2)))
    (if (local.get 0) (then (drop (call $deep)))) (drop (memory.grow (i32.const 3)))
    (i32.load (i32.const -1)))
  (func (export "first") unreachable) {functions}
  (func (export "between") (drop (call $grows (i32.const 1))))
  (func (export "after") (drop (memory.grow (i32.const 0))) (drop (call $grows (i32.const 0)))))"""


@pytest.mark.parametrize("functions", ["", "(func)" * 200], ids=["short calls", "longer calls"])
@pytest.mark.parametrize("name", ["first", "between", "after"])
def test_a_backtrace_is_that_of_the_module_as_it_came(functions: str, name: str) -> None:
    text = TRAPS.format(functions=functions)
    before, after = Instance(assembled(text)), Instance(noting(text))
    expected, changed = before.trap(name), after.trap(name)
    assert changed != expected
    assert as_it_came(changed, after.addresses) == expected


def test_what_was_put_in_is_in_no_backtrace() -> None:
    """The stack may be used up within it."""
    text = '(module (memory 1) (func $f (export "f") (drop (memory.grow (i32.const 0))) (call $f) (call $f)))'
    found = Instance(noting(text))
    frame = "  {:>3}:     0x2f - <unknown>!<wasm function 0>\n"
    frames = [frame.format(number).replace("0x2f", hex(found.addresses.ours - number)) for number in range(2)]
    trap = f"at:\n{''.join(frames)}"
    shown = as_it_came(trap, found.addresses)
    assert len(shown.splitlines()) == 2
    assert "    0: " in shown
    restored = as_it_came(found.trap("f"), found.addresses)
    numbers = [line.split(":")[0].strip() for line in restored.splitlines() if " - " in line]
    assert numbers == [str(number) for number in range(len(numbers))]


def test_an_address_in_front_of_all_code_stays() -> None:
    addresses = Addresses(((10, 4), (20, 12)), 30)
    assert [addresses.original(at) for at in (3, 10, 19, 20, 29, 30)] == [3, 4, 13, 12, 21, None]
    assert Addresses.parse(addresses.text()) == addresses


# Modules that mean harm.


def test_a_module_is_one_exactly_if_it_was(tmp_path: Path) -> None:
    """Whatever is rewritten of those that are none, the compiler refuses them."""
    generator, engine = seeded(), new_engine()
    seeds = [assembled(text) for text in (hostile.TABLES, hostile.GC_HEAP_AND_MEMORY, hostile.EXCEPTIONS, wasm.GROWN)]
    rewritten = refused = 0
    for _ in range(count(10_000, 400)):
        module = hostile.mutated(generator.choice(seeds), generator)
        made = note_refusals(module, "note", "start")
        if made is None:
            continue
        try:
            wasmtime.Module.validate(engine, module)
        except wasmtime.WasmtimeError:
            refused += 1
            with pytest.raises(wasmtime.WasmtimeError):
                write_compiled(module, "sha256:0", tmp_path / "none")
        else:
            rewritten += 1
            wasmtime.Module.validate(engine, made)
    assert not (tmp_path / "none").exists()
    assert rewritten > 20
    assert refused > 20


@given(st.binary(max_size=80))
def test_any_bytes_are_read(tail: bytes) -> None:
    note_refusals(b"\0asm\1\0\0\0" + tail, "note", "start")


def loaded(module: str, digest: str, path: Path) -> NativeModule:
    write_compiled(assembled(module), digest, path)
    engine = new_engine()
    store = wasmtime.Store(engine)
    store.set_epoch_deadline(1)
    store.set_limits(memory_size=LIMIT << 16)
    found = NativeModule(engine, wasmtime.Linker(engine), store)
    found.load(str(path))
    found.link()
    found.instantiate()
    return found


def test_the_note_is_found_and_no_other(tmp_path: Path) -> None:
    growing = '(func (export "_start") (drop (memory.grow (i32.const 100)))) (memory 1)'
    forged = '(global (export "cri-shim.io/refused/sha256:1 0:0 0") i64 (i64.const 9))'
    honest = loaded(f"(module {growing})", "sha256:2", tmp_path / "honest")
    note = read_note(honest, "sha256:2")
    honest.call("_start")
    assert note.refused(honest) == 100 << 16
    assert note == read_note(honest, "sha256:2")
    liar = loaded(f"(module {forged})", "sha256:2", tmp_path / "liar")
    assert read_note(liar, "sha256:2") == RefusalNote()
    assert read_note(liar, "sha256:2").refused(liar) == 0
    both = loaded(f"(module {forged} {growing})", "sha256:2", tmp_path / "both")
    assert read_note(both, "sha256:2").refused(both) == 0
    both.call("_start")
    assert read_note(both, "sha256:2").refused(both) == 100 << 16
    assert list(honest.functions()) == ["_start"]
