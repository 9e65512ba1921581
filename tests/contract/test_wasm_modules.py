"""Modules: what is accepted, how they are compiled, and that nobody pays for an engine that is not used."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import wasmtime

from cri_shim.adapters.pace import Pace
from cri_shim.model.container import Reason
from cri_shim.model.errors import CriShimError, FailedPrecondition, InvalidArgument
from cri_shim.model.handler import CompilesAhead, Kind
from cri_shim.spec.dispatch import DEFAULT_ALLOWED_ANNOTATIONS
from cri_shim.wire.wasm_binary import HEADER, Reader
from cri_shim.wire.wasm_code import END, MEMORY_GROW, skip_instruction, skip_locals
from cri_shim.wire.wasm_growth import note_refusals
from handlers.wasmtime import cache, kind
from handlers.wasmtime.engine import new_engine
from tests.contract.wasm_bench import WasmBench, limited, wasm_bench
from tests.support import hostile, wasm
from tests.support.scale import count


@pytest.fixture
async def bench(module_root: Path, tmp_path: Path) -> AsyncIterator[WasmBench]:
    async with wasm_bench(module_root, tmp_path / "state") as made:
        yield made


@pytest.fixture
async def fresh_bench(tmp_path: Path) -> AsyncIterator[WasmBench]:
    """Nothing is compiled yet."""
    async with wasm_bench(tmp_path / "root", tmp_path / "state") as made:
        yield made


def compiled_files(bench: WasmBench) -> list[Path]:
    return list(bench.layout.wasm_cache.rglob("*"))


async def test_a_module_is_compiled_once_for_all_who_ask(
    fresh_bench: WasmBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    run = fresh_bench.zygote.run

    async def counted(task: str, *args: Any, **named: Any) -> dict[str, Any]:
        runs.append(task)
        return await run(task, *args, **named)

    monkeypatch.setattr(fresh_bench.zygote, "run", counted)
    plans = [fresh_bench.artifact(wasm.HELLO) for _ in range(8)]
    await asyncio.gather(*(fresh_bench.handler.create(plan) for plan in plans))
    await fresh_bench.handler.create(fresh_bench.artifact(wasm.HELLO))
    assert runs == ["handlers.wasmtime.compile:compile_module"]


async def test_compiled_code_is_for_the_daemon_alone(fresh_bench: WasmBench) -> None:
    await fresh_bench.handler.create(fresh_bench.artifact(wasm.HELLO))
    directory, compiled = compiled_files(fresh_bench)
    modes = [path.stat().st_mode & 0o777 for path in (fresh_bench.layout.wasm_cache, directory, compiled)]
    assert modes == [0o700, 0o700, 0o600]
    assert directory.name.startswith("wasmtime-50.0.1-")


async def test_a_caller_who_leaves_does_not_stop_the_compiler_for_others(fresh_bench: WasmBench) -> None:
    impatient, patient = fresh_bench.artifact(wasm.HELLO), fresh_bench.artifact(wasm.HELLO)
    first = asyncio.create_task(fresh_bench.handler.create(impatient))
    second = asyncio.create_task(fresh_bench.handler.create(patient))
    await asyncio.sleep(0.05)
    first.cancel()
    await second
    await fresh_bench.handler.start(patient.id)
    assert (await fresh_bench.end_of(patient)).code == 0


async def test_damaged_compiled_code_is_replaced(fresh_bench: WasmBench) -> None:
    first, second = fresh_bench.artifact(wasm.HELLO), fresh_bench.artifact(wasm.HELLO)
    await fresh_bench.handler.create(first)
    _, compiled = compiled_files(fresh_bench)
    compiled.write_bytes(compiled.read_bytes()[:1000])
    with pytest.raises(
        FailedPrecondition, match=r"compiled form of the module cannot be used.*create the container again"
    ):
        await fresh_bench.handler.start(first.id)
    assert (await fresh_bench.finish(second)).code == 0


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (b"\0asm\x01\0\0\0\x01\x02garbage", "cannot be compiled"),
        (wasm.assemble(wasm.HELLO)[:-3], "cannot be compiled"),
        (b"\0asm\x0d\0\1\0\x01\x02garbage", "cannot be compiled"),
        (wasm.SHARED_MEMORY, "threads must be enabled"),
        (wasm.TWO_MEMORIES, "multiple memories"),
        (b"\0asm\x07\0\0\0", "version 7"),
        (b"\x7fELF\x02\x01\x01\0", "native code"),
        (b"(module (func $nowhere)", "cannot be compiled"),
        (b"(component (nothing))", "cannot be compiled"),
        (b"#!/bin/sh\n", "not a Wasm module"),
        (b"", "not a Wasm module"),
    ],
)
async def test_what_is_no_module_is_refused_by_name(bench: WasmBench, module: str | bytes, words: str) -> None:
    plan = bench.artifact(module)
    with pytest.raises(InvalidArgument, match=words):
        await bench.handler.create(plan)
    assert list(plan.bundle.iterdir()) == []


@pytest.mark.parametrize("begin", ["", ";; a comment\n(; another (; in it ;) ;)\n  "])
async def test_a_module_as_text(bench: WasmBench, begin: str) -> None:
    plan = bench.artifact((begin + wasm.HELLO).encode())
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == ["hello from wasm"]


async def test_the_memory_limit_of_a_text(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.HOG.encode(), linux=limited(8 << 20))
    ended = await bench.finish(plan)
    assert (ended.code, ended.reason) == (137, Reason.OOM_KILLED)


async def test_a_module_that_takes_for_ever_is_tried_once(
    fresh_bench: WasmBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_CPU_SECONDS", 1)
    plan, again = (fresh_bench.artifact(wasm.long_module(600_000)) for _ in range(2))
    with pytest.raises(FailedPrecondition, match="not compiled within 1 s of CPU time"):
        await fresh_bench.handler.create(plan)
    await fresh_bench.zygote.aclose()
    with pytest.raises(FailedPrecondition, match="not compiled within 1 s of CPU time"):
        await fresh_bench.handler.create(again)
    assert fresh_bench.zygote.pid is None


async def test_who_compiles_for_long_holds_up_no_other(fresh_bench: WasmBench) -> None:
    fresh_bench.handler._cache._turns = Pace(1, 0.1)  # type: ignore[attr-defined]
    bomb = asyncio.create_task(fresh_bench.handler.create(fresh_bench.artifact(wasm.long_module(600_000))))
    await asyncio.sleep(0)
    await fresh_bench.handler.create(fresh_bench.artifact(wasm.HELLO))
    assert not bomb.done()
    bomb.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bomb


async def test_a_container_gives_a_module_the_time_that_its_image_did_not(
    fresh_bench: WasmBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes while the module is compiled ahead."""
    monkeypatch.setattr(cache, "_AHEAD_CPU_SECONDS", 1)
    plan = fresh_bench.artifact(wasm.long_module(300_000))
    assert plan.image is not None
    assert plan.image.wasm is not None
    digest, handler = plan.image.wasm.digest, fresh_bench.handler
    assert isinstance(handler, CompilesAhead)
    ahead = asyncio.create_task(handler.compile_ahead(fresh_bench.layout.blob(digest), digest, "m"))
    await asyncio.sleep(0.1)
    await handler.create(plan)
    with pytest.raises(FailedPrecondition, match="not compiled within 1 s of CPU time"):
        await ahead


async def test_a_module_that_takes_too_much_memory_is_tried_once(fresh_bench: WasmBench) -> None:
    """A megabyte of it would take 2.4 GB."""
    plan, again = (fresh_bench.artifact(hostile.described("segments", 20_000)) for _ in range(2))
    for each in (plan, again):
        with pytest.raises(FailedPrecondition, match="takes more than 1088 MiB of memory to compile"):
            await fresh_bench.handler.create(each)
        await fresh_bench.zygote.aclose()
    assert fresh_bench.zygote.pid is None


async def test_a_blob_that_is_gone_or_changed_is_an_error(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.exits(99))
    assert plan.image is not None
    assert plan.image.wasm is not None
    blob = bench.layout.blob(plan.image.wasm.digest)
    blob.write_bytes(wasm.assemble(wasm.HELLO))
    with pytest.raises(CriShimError, match="has changed"):
        await bench.handler.create(plan)
    blob.unlink()
    with pytest.raises(FailedPrecondition, match="pull it again"):
        await bench.handler.create(plan)


# Options, and what the handler costs when nobody uses it.


def test_options_have_the_defaults_of_the_design() -> None:
    options = msgspec.convert({"kind": "wasmtime"}, kind.OPTIONS)
    assert options.linux_containers == "runc"
    assert options.allowed_annotations == DEFAULT_ALLOWED_ANNOTATIONS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"isolation": "vm"}, "isolation"),
        ({"linux_container": "runc"}, "unknown field `linux_container`"),
    ],
)
def test_options_that_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.convert({"kind": "wasmtime", **settings}, kind.OPTIONS)


UNUSED = """
import sys, threading
from types import SimpleNamespace
from handlers.wasmtime import kind
from cri_shim.adapters.context import HandlerContext
from cri_shim.model.layout import Layout
from pathlib import Path
context = HandlerContext(
    Layout(Path("/r"), Path("/s")), SimpleNamespace(host=None), None, None, None, "", {}, frozenset(), None, None, print
)
handler = kind.make("wasm", kind.OPTIONS(), context)
assert "wasmtime" not in sys.modules, "loaded"
assert threading.active_count() == 1
"""


async def test_an_unused_handler_loads_no_engine_and_has_no_thread() -> None:

    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", UNUSED], check=True, timeout=60)


def test_kind_and_features(bench: WasmBench) -> None:
    assert bench.handler.kind is Kind.WASM
    assert bench.handler.features.recursive_read_only_mounts
    assert "node" in bench.handler.features.no_user_namespaces


def test_the_code_of_a_real_module_is_read_to_its_end(go_server: bytes) -> None:
    """Each function ends where it says, and one grows the memory."""
    reader = Reader(go_server, HEADER)
    kind, content = reader.section()
    while kind != 10:
        kind, content = reader.section()
    opcodes = set[int]()
    for number in range(content.number()):
        size = content.number()
        body = Reader(go_server, content.at, content.at + size)
        content.at = body.end
        if number % count(1, 8) and b"\x40\0" not in go_server[body.at : body.end]:
            continue
        skip_locals(body)
        last = END
        while body.at < body.end:
            opcodes.add(last := skip_instruction(body))
        assert (last, body.at) == (END, body.end)
    assert MEMORY_GROW in opcodes
    assert len(opcodes) > 50
    noting = note_refusals(go_server, "note", "start")
    assert noting is not None
    wasmtime.Module.validate(new_engine(), noting)
