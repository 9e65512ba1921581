"""WASI 0.2 in Python, by components that are assembled on the spot and linked as a worker links them."""

# mypy: disable-error-code="explicit-override"

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import wasmtime
from wasmtime.component import Component

from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.ids import Digest
from handlers.wasmtime.engine import new_engine
from handlers.wasmtime.guest_spec import Entry, GuestSpec
from handlers.wasmtime.wasip2 import calls, linker
from handlers.wasmtime.wasip2.interface import Exited, Interface, Trap, methods
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.world import new_world
from tests.support import wasm


@dataclass
class Guest:
    """`HostedGuest`."""

    spec: GuestSpec
    codes: list[int] = field(default_factory=list)
    defects: list[Exception] = field(default_factory=list)

    def resting(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def leave(self, code: int) -> None:
        self.codes.append(code)

    def fail(self, error: Exception) -> None:
        self.defects.append(error)


def spec(**changes: Any) -> GuestSpec:
    values: dict[str, Any] = {
        "entry": Entry("", Digest(f"sha256:{'0' * 64}"), "_start"),
        "argv": ("program", "one"),
        "env": (("PWD", "/srv"), ("A", "b")),
        "preopens": (),
        "memory_limit": 0,
        "cpu": None,
        "nice": 0,
        "cpus": (),
        "log_path": "",
    }
    return GuestSpec(**(values | changes))


class Bench:
    """One world, and what its guests write."""

    def __init__(self, resources: ExitStack) -> None:
        self.resources = resources
        self.guest = Guest(spec())
        self.world = new_world(self.guest, resources)
        self.engine = new_engine()
        self.store = wasmtime.Store(self.engine)
        self.store.set_epoch_deadline(1)
        self._read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        resources.callback(os.close, self._read)
        resources.callback(os.close, write)
        self.world.stdout = self.world.stderr = write
        self.interfaces: dict[str, Interface] = {}

    def find(self, name: str) -> Interface | None:
        return self.interfaces.get(name) or linker.find_interface(self.world, name)

    def run(self, text: str, export: str = "wasi:cli/run@0.2.0", *arguments: object) -> Any:
        """Call the function `run` of an interface that the component exports."""
        component = Component(self.engine, text)
        linked = linker.link(self.world, component, self.engine, self.resources, self.find)
        instance = linked.instantiate(self.store, component)
        interface = instance.get_export_index(self.store, export)
        index = instance.get_export_index(self.store, "run", interface)
        assert index is not None
        run = instance.get_func(self.store, index)
        assert run is not None
        return calls.call(self.world.table, self.store, run, *arguments)

    def passes(self, text: str, values: object, host: Callable[[Any], Any]) -> Any:
        """What comes back from the host through the component."""
        self.interfaces["wasi:test/values@0.2.0"] = Interface(functions={"pass": host})
        return self.run(text, "wasi:test/runs@0.2.0", values)

    def said(self) -> bytes:
        return os.read(self._read, 65536)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as resources:
        yield Bench(resources)


def test_a_component_runs_on_our_host(bench: Bench) -> None:
    assert bench.run(wasm.component("(call $say) (i32.const 0)")) == ("ok", None)
    assert bench.run(wasm.component("(call $say) (i32.const 1)")) == ("err", None)
    assert bench.said() == b"hello from a component\n" * 2
    assert not bench.guest.defects


@pytest.mark.parametrize("version", ["0.2.0", "0.2.7", "0.2.12"])
def test_every_version_is_served_as_it_is_asked_for(bench: Bench, version: str) -> None:
    text = wasm.component("(call $say) (i32.const 0)").replace("@0.2.0", f"@{version}")
    assert bench.run(text, f"wasi:cli/run@{version}") == ("ok", None)


def test_a_wait_ends_when_it_is_told_to_stop(bench: Bench) -> None:
    threading.Timer(0.05, bench.world.waiter.stop).start()
    with pytest.raises(wasmtime.WasmtimeError):
        bench.run(wasm.component("(call $wait) (i32.const 0)"))
    assert not bench.guest.defects


@pytest.mark.parametrize("name", ["wasi:io/poll@0.3.0", "wasi:io/poll", "a:b/c@0.2.0"])
def test_what_is_not_there_is_refused_by_name(bench: Bench, name: str) -> None:
    with pytest.raises(FailedPrecondition, match=f"imports {name}, which is not provided"):
        bench.run(f'(component (import "{name}" (instance (export "f" (func)))))')
    with pytest.raises(FailedPrecondition, match="imports f, which is not provided"):
        bench.run('(component (import "f" (func)))')
    with pytest.raises(FailedPrecondition, match=r"imports wasi:io/poll@0\.2\.0 frob, which"):
        bench.run('(component (import "wasi:io/poll@0.2.0" (instance (export "frob" (func)))))')


# Values: a component passes a list of them to an import, and gives back the list that comes.

PASSES = """(component
  (import "wasi:test/values@0.2.0" (instance $host TYPE (export "pass" (func (param "values" LIST) (result LIST)))))
  (core module $libc (memory (export "memory") 4)
    (global $next (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (global.get $next)
      (global.set $next (i32.and (i32.add (i32.add (global.get $next) (local.get 3)) (i32.const 7)) (i32.const -8)))))
  (core instance $libc (instantiate $libc))
  (alias core export $libc "memory" (core memory $memory))
  (alias core export $libc "realloc" (core func $realloc))
  (core func $pass (canon lower (func $host "pass") (memory $memory) (realloc $realloc)))
  (core module $main
    (import "host" "pass" (func $pass (param i32 i32 i32)))
    (func (export "run") (param i32 i32) (result i32)
      (call $pass (local.get 0) (local.get 1) (i32.const 16)) (i32.const 16)))
  (core instance $main (instantiate $main (with "host" (instance (export "pass" (func $pass))))))
  ALIAS
  (func $run (param "values" LIST) (result LIST)
    (canon lift (core func $main "run") (memory $memory) (realloc $realloc)))
  (instance $exported EXPORT (export "run" (func $run)))
  (export "wasi:test/runs@0.2.0" (instance $exported)))"""


def passing(wit: str) -> str:
    """Of lists of `wit`, which has a name of its own where it needs one."""
    if '"' not in wit:
        words = {"TYPE": "", "ALIAS": "", "EXPORT": "", "LIST": f"(list {wit})"}
    else:
        words = {
            "TYPE": f'(type $named {wit}) (export "t" (type $t (eq $named)))',
            "ALIAS": '(alias export $host "t" (type $t))',
            "EXPORT": '(export "t" (type $t))',
            "LIST": "(list $t)",
        }
    text = PASSES
    for word, replacement in words.items():
        text = text.replace(word, replacement)
    return text


@pytest.mark.parametrize(
    ("wit", "values"),
    [
        ("bool", [True, False]),
        ("s8", [-128, 127]),
        ("u8", bytes(range(256))),
        ("u8", b""),
        ("s16", [-32768]),
        ("u16", [65535]),
        ("s32", [-(1 << 31)]),
        ("u32", [(1 << 32) - 1]),
        ("s64", [-(1 << 63)]),
        ("u64", [(1 << 64) - 1]),
        ("f32", [0.5]),
        ("f64", [0.1]),
        ("char", ["x", "\U0001f980"]),
        ("string", ["", "grüße"]),
        ("(list u8)", [b"", b"abc"]),
        ("(list u16)", [[], [1, 2]]),
        ("(tuple u8 string)", [(1, "a"), (2, "")]),
        ("(option string)", [None, "", "x"]),
        ("(option (tuple u8 u8))", [None, (1, 2)]),
        ("(result u8 (error string))", [("ok", 1), ("err", "no")]),
        ("(result)", [("ok", None), ("err", None)]),
        ('(enum "one" "two-three")', ["one", "two-three"]),
        ('(flags "a" "b" "c-d")', [frozenset(), frozenset({"a", "c-d"})]),
        ('(record (field "x" u8) (field "long-name" (list string)))', [{"x": 1, "long-name": ["a", ""]}]),
        ('(variant (case "none") (case "some" (tuple u64 u64)))', [("none", None), ("some", (1, 2))]),
    ],
)
def test_values_come_through_as_they_are(bench: Bench, wit: str, values: object) -> None:
    seen = []

    def host(given: object) -> object:
        seen.append(given)
        return given

    assert bench.passes(passing(wit), values, host) == values
    assert seen == [values]


def test_a_host_function_with_a_defect_ends_the_guest(bench: Bench) -> None:
    with pytest.raises(wasmtime.WasmtimeError):
        bench.passes(passing("u8"), b"x", lambda _: 1 // 0)
    assert isinstance(bench.guest.defects[0], ZeroDivisionError)


def test_a_trap_has_its_words(bench: Bench) -> None:
    def host(_: object) -> None:
        msg = "it must not"
        raise Trap(msg)

    with pytest.raises(wasmtime.WasmtimeError, match="it must not"):
        bench.passes(passing("u8"), b"x", host)


def test_who_exits_has_its_code(bench: Bench) -> None:
    def host(_: object) -> None:
        raise Exited(77)

    with pytest.raises(wasmtime.WasmtimeError):
        bench.passes(passing("u8"), b"x", host)
    assert bench.guest.codes == [77]


# Resources.

OWNS = """(component
  (import "wasi:test/things@0.2.0" (instance $host
    (export "thing" (type $thing (sub resource)))
    (export "[constructor]thing" (func (param "n" u32) (result (own $thing))))
    (export "[method]thing.count" (func (param "self" (borrow $thing)) (result u32)))
    (export "swallow" (func (param "thing" (own $thing))))))
  (alias export $host "thing" (type $thing))
  (core func $new (canon lower (func $host "[constructor]thing")))
  (core func $count (canon lower (func $host "[method]thing.count")))
  (core func $swallow (canon lower (func $host "swallow")))
  (core func $drop (canon resource.drop $thing))
  (core module $main
    (import "host" "new" (func $new (param i32) (result i32)))
    (import "host" "count" (func $count (param i32) (result i32)))
    (import "host" "swallow" (func $swallow (param i32)))
    (import "host" "drop" (func $drop (param i32)))
    (func (export "run") (result i32) (local $a i32) (local $b i32)
      (local.set $a (call $new (i32.const 40)))
      (local.set $b (call $new (i32.const 2)))
      (drop (call $new (i32.const 1)))
      (i32.add (call $count (local.get $a)) (call $count (local.get $b)))
      (call $drop (local.get $b))
      (call $swallow (local.get $a))))
  (core instance $main (instantiate $main (with "host" (instance
    (export "new" (func $new)) (export "count" (func $count))
    (export "swallow" (func $swallow)) (export "drop" (func $drop))))))
  (func $run (result u32) (canon lift (core func $main "run")))
  (instance $exported (export "run" (func $run)))
  (export "wasi:test/runs@0.2.0" (instance $exported)))"""


class Thing(Resource, resource=True):
    closed: ClassVar[list[int]] = []

    def __init__(self, number: int) -> None:
        self.number = number

    def count(self) -> int:
        return self.number

    def close(self) -> None:
        self.closed.append(self.number)


def test_resources_are_lent_given_back_and_closed(bench: Bench) -> None:
    swallowed: list[Thing] = []
    functions: dict[str, Any] = {
        "[constructor]thing": Thing,
        "swallow": swallowed.append,
        **methods("thing", Thing, "count"),
    }
    bench.interfaces["wasi:test/things@0.2.0"] = Interface({"thing": Thing}, functions)
    assert bench.run(OWNS, "wasi:test/runs@0.2.0") == 42
    assert ([thing.number for thing in swallowed], Thing.closed, len(bench.world.table)) == ([40], [2], 1)
    bench.world.table.close()
    assert Thing.closed == [2, 1]
