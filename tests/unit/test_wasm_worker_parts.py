"""What a worker is made of, as far as it needs none: what its zygote loads, how it waits, what a module exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from cri_shim.adapters.log_pump import LogPump
from cri_shim.adapters.log_sink import LogFile
from cri_shim.wire.crilog import Stream
from handlers.wasmtime.native import NativeModule
from handlers.wasmtime.stopping import Stopping

TOO_MUCH = {"asyncio", "google.protobuf", "random", "wasmtime.component", "structlog", "subprocess"}


def test_the_zygote_of_modules_loads_nothing_that_no_module_needs() -> None:
    """Each worker has in memory of its own what it touches of it, and more lies in between."""
    assert TOO_MUCH & set(in_a_zygote("import handlers.wasmtime.worker; found = list(sys.modules)")) == set()


def test_a_rehearsal_leaves_nothing_behind() -> None:
    facts = "[*(sorted(os.listdir(f'/proc/self/{what}')) for what in ('task', 'fd')), open('/proc/self/comm').read()]"
    script = f"import os, handlers.wasmtime.rehearsal as r; found = [{facts}]; r.rehearse(); found.append({facts})"
    before, after = in_a_zygote(script)
    assert before == after
    assert len(before[0]) == 1


def in_a_zygote(script: str) -> Any:
    """What it has `found`, said on nothing but standard output."""
    around = f"import json, sys; sys.path[:0] = json.loads(sys.argv[1]); {script}; print(json.dumps(found))"
    command = [sys.executable, "-I", "-S", "-c", around, json.dumps(sys.path)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert done.stderr == b""
    return json.loads(done.stdout)


def test_stopping_ends_a_wait_and_every_later_one() -> None:
    stopping = Stopping()
    assert not stopping.wait(0.001)
    threading.Timer(0.05, stopping.set).start()
    begin = time.monotonic()
    assert stopping.wait(60)
    assert time.monotonic() - begin < 30
    stopping.set()
    assert stopping.is_set
    assert stopping.wait(60)


def native(
    text: str, at: Path, engine: wasmtime.Engine | None = None, store: wasmtime.Store | None = None
) -> NativeModule:
    engine = engine or wasmtime.Engine()
    at.write_bytes(wasmtime.Module(engine, text).serialize())
    module = NativeModule(engine, wasmtime.Linker(engine), store or wasmtime.Store(engine))
    module.load(str(at))
    return module


def test_functions_and_their_parameters(tmp_path: Path) -> None:
    text = """(module (memory (export "memory") 1) (global (export "g") i32 (i32.const 1))
      (func (export "_start")) (func (export "two") (param i32 i64)) (func (export "ünï")) (func $not))"""
    assert native(text, tmp_path / "some").functions() == {"_start": 0, "two": 2, "ünï": 0}
    assert native("(module)", tmp_path / "none").functions() == {}


def test_a_module_runs_and_says_how_it_ended(tmp_path: Path) -> None:
    text = """(module (memory (export "memory") 1)
      (func (export "write") (i32.store8 (i32.const 7) (i32.const 42))) (func (export "ünï") unreachable))"""
    store = wasmtime.Store(engine := wasmtime.Engine())
    module = native(text, tmp_path / "module", engine, store)
    module.link()
    module.instantiate()
    module.call("write")
    memory = module.memory()
    assert memory is not None
    assert memory.read(store, 6, 9) == b"\0\x2a\0"
    with pytest.raises(wasmtime.Trap, match="unreachable"):
        module.call("ünï")
    for name in ("memory", "no"):
        with pytest.raises(KeyError):
            module.call(name)
    module.close()
    module.close()


def test_what_cannot_be_loaded_or_linked_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(wasmtime.WasmtimeError, match="failed to open file"):
        NativeModule(engine := wasmtime.Engine(), wasmtime.Linker(engine), wasmtime.Store(engine)).load("/no/such")
    module = native('(module (import "env" "gone" (func)) (func (export "_start")))', tmp_path / "module")
    with pytest.raises(wasmtime.WasmtimeError, match="unknown import"):
        module.link()
    module = native("(module (func $f unreachable) (start $f))", tmp_path / "traps")
    module.link()
    with pytest.raises(wasmtime.Trap, match="unreachable"):
        module.instantiate()
    assert module.memory() is None


@pytest.mark.timeout(30)
def test_a_pump_without_a_thread_is_turned_by_its_owner(tmp_path: Path) -> None:
    pump, ended = LogPump(threaded=False), []
    threads = threading.active_count()
    read, write = os.pipe2(os.O_CLOEXEC)
    pump.attach(LogFile(str(tmp_path / "log")), {Stream.STDOUT: read}, lambda: ended.append(True))
    assert threading.active_count() <= threads
    os.write(write, b"a line\n")
    pump.turn(pump.start())
    assert (tmp_path / "log").read_text().endswith(" stdout F a line\n")
    os.close(write)
    pump.turn(pump.start())
    assert ended == [True]
    pump.close()
