"""Guests that mean harm, in the daemon and in a process of their own: what becomes of them, and that nothing is left.

Not the daemon around them (`tests/e2e/test_wasm_hostile.py`). Small numbers by default, those of the requirement under
`scripts/test --full`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import os
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import wasmtime

from cri_shim.model.container import Reason
from cri_shim.model.errors import CriShimError
from cri_shim.model.ids import Digest
from handlers.wasmtime import placement
from handlers.wasmtime.compile import write_compiled
from handlers.wasmtime.errnos import Errno
from handlers.wasmtime.guest_spec import Entry
from tests.contract.handler_suite import until
from tests.contract.wasm_bench import WasmBench, descriptors, limited, mount, worker_bench
from tests.support import hostile, leftovers, wasm
from tests.support.cri import read_log
from tests.support.scale import count, seeded
from tests.support.wasi_calls import random_calls

pytestmark = pytest.mark.root

LIMIT = 10 << 20
_log = logging.getLogger(__name__)
"""Figures: `--log-cli-level=info` shows them."""


def anonymous_kib() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


# Memory.


@pytest.mark.parametrize(
    "guest",
    [
        pytest.param(wasm.TOUCHING_HOG, id="one memory"),
        pytest.param(hostile.GC_HEAP, id="GC heap"),
        pytest.param(hostile.GC_HEAP_AND_MEMORY, id="GC heap and memory"),
        pytest.param(hostile.EXCEPTIONS, id="exceptions"),
        pytest.param(hostile.TABLES, id="tables"),
        pytest.param(hostile.HUGE_TABLE, id="huge table"),
        pytest.param(wasm.HUGE, id="huge memory"),
    ],
)
async def test_the_limit_is_for_all_memory_together(bench: WasmBench, in_process: bool, guest: str) -> None:
    """And only the one that reached it is ended."""
    bystander = await bench.begin(bench.artifact(wasm.SLEEP))
    await bench.finish(bench.artifact(wasm.GROWN.replace("3600000000000", "1")))  # what is taken once
    plan = bench.artifact(guest, linux=limited(LIMIT))
    before, peak = anonymous_kib(), 0
    await bench.begin(plan)
    while plan.id not in bench.ends:
        peak = max(peak, anonymous_kib() - before)
        await asyncio.sleep(0.001)
    ended = await bench.end_of(plan)
    if in_process:
        assert (ended.code, ended.reason) == (137, Reason.OOM_KILLED), ended.message
        assert peak < (LIMIT >> 10) + 2048
    else:
        # What it only reserves costs a process of its own nothing: it is no lack of memory there.
        harmless = guest == wasm.HUGE
        assert (ended.code, ended.reason) == ((0, Reason.COMPLETED) if harmless else (137, Reason.OOM_KILLED))
    assert bystander.id not in bench.ends


@pytest.mark.parametrize(
    ("ends", "code", "reason"),
    [
        pytest.param("unreachable", 137, Reason.OOM_KILLED, id="trap"),
        pytest.param("(call $exit (i32.const 2))", 137, Reason.OOM_KILLED, id="code"),
        pytest.param("(call $exit (i32.const 0))", 0, Reason.COMPLETED, id="well"),
    ],
)
async def test_who_asks_for_far_more_than_the_limit_at_once(
    bench: WasmBench, in_process: bool, ends: str, code: int, reason: Reason
) -> None:
    """In the daemon it is refused; a process of its own gets it, and ends when it is written to."""
    plan = bench.artifact(hostile.wants(1600, ends), linux=limited(LIMIT))
    ended = await bench.finish(plan)
    if in_process:
        assert (ended.code, ended.reason) == (code, reason)
        assert ("asked for 104857600 bytes more" in ended.message) is (code == 137)
    else:
        assert (ended.code, ended.reason) == (137, Reason.OOM_KILLED)


async def test_who_asks_for_more_than_the_limit_in_a_start_function(bench: WasmBench, in_process: bool) -> None:
    ended = await bench.finish(bench.artifact(hostile.wants(1600, "unreachable", at_start=True), linux=limited(LIMIT)))
    assert (ended.code, ended.reason) == (137, Reason.OOM_KILLED), ended.message
    assert ("asked for 104857600 bytes more" in ended.message) is in_process


async def test_what_its_own_maximum_refuses_is_no_lack_of_memory(bench: WasmBench) -> None:
    ended = await bench.finish(bench.artifact(hostile.wants(1600, "unreachable", "50"), linux=limited(LIMIT)))
    assert (ended.code, ended.reason) == (134, Reason.ERROR)


async def test_who_is_content_with_less_has_enough(bench: WasmBench) -> None:
    """It tries less and less, gets some, and ends badly for another reason."""
    ended = await bench.finish(bench.artifact(hostile.TRIES_LESS, linux=limited(LIMIT)))
    assert (ended.code, ended.reason) == (3, Reason.ERROR)


async def test_without_a_limit_nobody_is_out_of_memory(bench: WasmBench) -> None:
    """What 32 bits cannot say is refused."""
    ended = await bench.finish(bench.artifact(hostile.wants(65536, "(call $exit (i32.const 2))")))
    assert (ended.code, ended.reason) == (2, Reason.ERROR)


@pytest.mark.parametrize("guest", [hostile.MANY_MEMORIES, wasm.TWO_MEMORIES, wasm.SHARED_MEMORY])
async def test_more_than_one_memory_and_shared_ones_are_no_modules(bench: WasmBench, guest: str) -> None:
    with pytest.raises(CriShimError, match="cannot be compiled"):
        await bench.handler.create(bench.artifact(guest))


@pytest.mark.parametrize(("kind", "number"), [("types", 3000), ("exports", 20_000)])
async def test_what_is_long_to_describe_is_not_described_in_the_daemon(
    bench: WasmBench, in_process: bool, kind: str, number: int
) -> None:
    """The engine keeps types and exports decoded, in memory that no limit of its own counts."""
    await bench.finish(bench.artifact(wasm.HELLO))
    before = anonymous_kib()
    plan = await bench.begin(bench.artifact(hostile.described(kind, number), linux=limited(64 << 20)))
    info = bench.handler.info(plan.id)
    assert info["placement"] == "process"
    assert ("types, imports and exports" in str(info["placementReason"])) is in_process
    assert anonymous_kib() - before < 2048
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143


async def test_what_is_short_to_describe_is_quick(bench: WasmBench, in_process: bool) -> None:
    plan = await bench.begin(bench.artifact(hostile.described("exports", 2000), linux=limited(LIMIT)))
    assert bench.handler.info(plan.id)["placement"] == ("in-process" if in_process else "process")
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143


async def test_a_module_that_its_limit_cannot_even_load_is_not_started(bench: WasmBench) -> None:
    plan = bench.artifact(hostile.described("exports", 100_000), linux=limited(LIMIT))
    await bench.handler.create(plan)
    with pytest.raises(CriShimError, match=r"could not be started: the memory limit was reached; loading"):
        await bench.handler.start(plan.id)


async def test_what_the_engine_copies_does_not_stay(bench: WasmBench, tmp_path: Path) -> None:
    mounts = [mount(tmp_path, "/data")]
    await bench.finish(bench.artifact(hostile.writes_much(1), mounts=mounts))
    before = anonymous_kib()
    assert (await bench.finish(bench.artifact(hostile.writes_much(400), mounts=mounts))).code == 0
    assert (tmp_path / "much").stat().st_size == 400 << 16
    await until(lambda: anonymous_kib() < before + 4096)


async def test_nothing_of_a_container_stays_that_a_collection_could_take(bench: WasmBench) -> None:
    async def run_one() -> None:
        plan = bench.artifact(wasm.HELLO)
        await bench.finish(plan)
        await bench.handler.delete(plan.id, bench.cgroup_parent)
        bench.plans.remove(plan)

    await run_one()
    gc.collect()
    before = gc.get_freeze_count(), len(gc.get_objects())
    for _ in range(20):
        await run_one()
    gc.collect()
    frozen, tracked = gc.get_freeze_count(), len(gc.get_objects())
    assert frozen <= before[0]
    assert tracked < before[1] + 500


# Stopping.


@pytest.mark.parametrize(
    ("guest", "ready"),
    [
        pytest.param(wasm.SPIN, "", id="computes"),
        pytest.param(wasm.SLEEP, "going to sleep", id="sleeps"),
        pytest.param(wasm.ASKER, "", id="asks"),
        pytest.param(wasm.CAT, "ready", id="reads"),
        pytest.param(wasm.floods(0), "x", id="floods"),
    ],
)
async def test_the_stop_signal_ends_it_at_once(bench: WasmBench, guest: str, ready: str) -> None:
    """The median is held, generously for a busy machine; the figures themselves are logged."""
    taken = []
    for number in range(count(100, 6)):
        plan = await bench.begin(bench.artifact(guest, stdin=guest == wasm.CAT))
        if ready:
            await bench.said(plan, ready)
        else:
            await asyncio.sleep(0.005)
        asked = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[number % 3]
        begin = time.perf_counter()
        await bench.handler.kill(plan.id, asked)
        ended = await bench.end_of(plan)
        taken.append((time.perf_counter() - begin) * 1000)
        assert (ended.code, ended.reason) == (128 + asked, Reason.ERROR)
        await bench.handler.delete(plan.id, bench.cgroup_parent)
    _log.info("stop: p50 %.2f ms, max %.2f ms", statistics.median(taken), max(taken))
    assert statistics.median(taken) < 5_000


# Ends.


async def test_everybody_gets_their_own_exit_code(bench: WasmBench, in_process: bool) -> None:
    """Exit codes, traps and signals of many at once: the engine's bindings would mix them up."""
    number = count(500, 60) if in_process else count(100, 20)
    plans = {}
    for each in range(number):
        guest, args = (wasm.TRAP, ()) if each % 10 == 9 else (wasm.PROGRAMS["exit"], ("exit", str(each % 256)))
        plans[each] = bench.artifact(guest, *args)
        await bench.handler.create(plans[each])
    await asyncio.gather(*(bench.handler.start(plan.id) for plan in plans.values()))
    for each, plan in plans.items():
        ended = await bench.end_of(plan)
        assert ended.code == (134 if each % 10 == 9 else each % 256)
        if each % 10 == 9:
            assert "wasm backtrace" in ended.message
            assert "unreachable" in "\n".join(bench.text(plan))


async def test_deep_recursion_is_a_trap(bench: WasmBench) -> None:
    for _ in range(count(50, 3)):
        ended = await bench.finish(bench.artifact(wasm.RECURSE))
        assert ended.code == 134
        assert "call stack exhausted" in ended.message


async def test_deep_recursion_may_end_in_the_host(bench: WasmBench) -> None:
    """Its stack is used up by then, and not that of the host's functions, those in Python among them."""
    for call in (
        "(drop (call $random (i32.const 64) (i32.const 8)))",
        "(drop (call $poll (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)))",
    ):
        ended = await bench.finish(bench.artifact(hostile.recurses(call)))
        assert ended.code == 134
        assert "call stack exhausted" in ended.message


@pytest.mark.parametrize(
    "module",
    [
        f'(module (import "{"x" * 90_000}" "y" (func)) (func (export "_start")))',
        wasm.HELLO.replace("_start", "x" * 90_000),
    ],
    ids=["import", "export"],
)
async def test_an_error_has_room_in_a_status(bench: WasmBench, module: str) -> None:
    plan = bench.artifact(module)
    with pytest.raises(CriShimError, match=r"cannot be linked|exports no function") as caught:
        await bench.begin(plan)
    assert len(str(caught.value)) < 3000


# Files.


async def test_files_without_end(bench: WasmBench, tmp_path: Path, in_process: bool) -> None:
    """One guest cannot take the descriptors of the daemon, and gives back those that it had."""
    (tmp_path / "file").write_text("content")
    mounts = [mount(tmp_path, "/data")]
    await bench.finish(bench.artifact(hostile.opens("file", 1), mounts=mounts))
    before, peak = descriptors(), 0
    plan = await bench.begin(bench.artifact(hostile.opens("file", 50_000), mounts=mounts))
    while plan.id not in bench.ends:
        peak = max(peak, descriptors() - before)
        await asyncio.sleep(0.001)
    ended = await bench.end_of(plan)
    if in_process:
        assert ended.code == 1 + Errno.MFILE
        assert peak < 1200
    else:  # it has the limit of its process
        assert ended.code in {0, 1 + Errno.IO, 1 + Errno.MFILE}
        assert peak < 100
    await until(lambda: descriptors() <= before)
    for times, close in ((1000, False), (count(50_000, 3000), True)):
        assert (await bench.finish(bench.artifact(hostile.opens("file", times, close=close), mounts=mounts))).code == 0


async def test_who_waits_for_input_leaves_the_others_their_files(
    module_root: Path, tmp_path: Path, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has 512 threads for file calls, and a read that waits keeps one."""
    monkeypatch.setattr(placement, "MOST_READERS", count(256, 10))
    (tmp_path / "file").write_text("content\n")
    parent = f"/{leftovers.CGROUP_PREFIX}{run_name}/readers"
    async with worker_bench(module_root, tmp_path / "state", parent, isolation="in-process") as bench:
        places = []
        for _ in range(placement.MOST_READERS + 5):
            plan = await bench.begin(bench.artifact(wasm.CAT, stdin=True))
            places.append(bench.handler.info(plan.id)["placement"])
        assert places == ["in-process"] * placement.MOST_READERS + ["process"] * 5
        plan = bench.artifact(wasm.prints_file(3, "file"), mounts=[mount(tmp_path, "/data")])
        assert (await bench.finish(plan)).code == 0
        assert bench.text(plan) == ["content"]


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "/etc/passwd",
        "link",
        "absolute",
        "up/../../secret",
        "directory/secret",
        "magic",
        "magic/secret",
        "dangling",
        "loop",
        "directory/../../volume/../secret",
    ],
)
async def test_no_path_leads_out(bench: WasmBench, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret\n")
    volume = tmp_path / "volume"
    volume.mkdir()
    outside = os.open(tmp_path, os.O_PATH)
    for name, target in {
        "link": "../secret",
        "absolute": str(tmp_path / "secret"),
        "directory": "..",
        "magic": f"/proc/self/fd/{outside}",
        "dangling": "../made",
        "loop": "loop",
    }.items():
        (volume / name).symlink_to(target)
    (volume / "up").mkdir()
    mounts = [mount(volume, "/data")]
    read = bench.artifact(wasm.prints_file(3, path), mounts=mounts)
    assert (await bench.finish(read)).code != 0
    assert bench.entries(read) == []
    assert (await bench.finish(bench.artifact(wasm.writes_file(3, path, "x"), mounts=mounts))).code != 0
    os.close(outside)
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name in {"made", "secret", "volume"}) == [
        "secret",
        "volume",
    ]
    assert (tmp_path / "secret").read_text() == "secret\n"


@pytest.mark.parametrize(
    ("call", "source", "target"),
    [
        ("path_rename", (3, "mine"), (3, "../taken")),
        ("path_rename", (3, "../secret"), (3, "taken")),
        ("path_rename", (3, "mine"), (4, "moved")),
        ("path_rename", (4, "theirs"), (3, "moved")),
        ("path_link", (3, "../secret"), (3, "taken")),
        ("path_link", (4, "theirs"), (3, "taken")),
        ("path_symlink", (3, "/etc/passwd"), (3, "../taken")),
        ("path_symlink", (3, "/etc/passwd"), (4, "taken")),
    ],
)
async def test_nothing_is_moved_over_the_border(
    bench: WasmBench, tmp_path: Path, call: str, source: tuple[int, str], target: tuple[int, str]
) -> None:
    """Of a directory, and of one that is read-only."""
    (tmp_path / "secret").write_text("secret\n")
    for name, file in (("ours", "mine"), ("readonly", "theirs")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(file)
    mounts = [mount(tmp_path / "ours", "/a"), mount(tmp_path / "readonly", "/b", readonly=True)]
    assert (await bench.finish(bench.artifact(hostile.moves(call, source, target), mounts=mounts))).code != 0
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine"]
    assert [path.name for path in (tmp_path / "readonly").iterdir()] == ["theirs"]
    assert not (tmp_path / "taken").exists()
    assert (tmp_path / "secret").read_text() == "secret\n"


# Logs.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


async def test_a_disk_that_is_full_of_logs_holds_up_nobody(bench: WasmBench, small_disk: Path) -> None:
    """What does not fit is lost, in whole entries; the guest goes on, others too, and it is stopped as ever."""
    flood = replace(bench.artifact(wasm.floods(0)), log_path=small_disk / "log")
    await bench.begin(flood)
    await until(lambda: (small_disk / "log").stat().st_size > 900_000)
    other = await bench.begin(bench.artifact(wasm.SLEEP))
    await bench.said(other, "going to sleep")
    assert flood.log_path is not None
    # Room again, as a rotation makes it: what comes from now on is written.
    flood.log_path.rename(flood.log_path.with_suffix(".1"))
    flood.log_path.with_suffix(".1").write_bytes(b"")
    await bench.handler.reopen_log(flood.id)
    await until(lambda: flood.log_path is not None and flood.log_path.exists() and flood.log_path.stat().st_size > 1000)
    await bench.handler.kill(flood.id, signal.SIGTERM)
    assert (await bench.end_of(flood)).code == 143
    assert {line.text for line in read_log(flood.log_path) if not line.partial} == {"x" * 99}


# Calls.


@pytest.mark.timeout(count(1200, 120))
@pytest.mark.parametrize("listens", [False, True])
async def test_any_calls_in_any_order(bench: WasmBench, tmp_path: Path, in_process: bool, listens: bool) -> None:
    """Each ends by a trap or by the stop, promptly, and takes nothing of the daemon's that it does not give back."""
    generator = seeded()
    guests = [wasm.assemble(random_calls(generator, 2000)) for _ in range(count(200, 8))]
    for name, target in {"link": "file", "loop": "loop"}.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "file").write_text("content")
    (tmp_path / "directory").mkdir()
    with socket.create_server(("", 0)) as probe:
        annotations = {"cri-shim.io/listen": str(probe.getsockname()[1])} if listens else {}
    await bench.finish(bench.artifact(wasm.HELLO))
    for guest in guests:  # here, which is quicker than a process for each
        digest = Digest(f"sha256:{hashlib.sha256(guest).hexdigest()}")
        write_compiled(guest, digest, bench.handler._cache.path(Entry("", digest, "")))  # type: ignore[attr-defined]
    ends = Counter[int]()
    before = files = peak = 0
    for number, guest in enumerate((guests[0], *guests)):
        if number == 1:  # what is taken once has been taken
            before, files, peak = anonymous_kib(), descriptors(), 0
        plan = bench.artifact(
            guest, "m", linux=limited(LIMIT), mounts=[mount(tmp_path, "/data")], annotations=annotations
        )
        await bench.begin(plan)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(count(10, 2) / 10):
                while plan.id not in bench.ends:
                    peak = max(peak, anonymous_kib() - before)
                    await asyncio.sleep(0.005)
        await bench.handler.kill(plan.id, signal.SIGTERM)
        ends[(await bench.end_of(plan)).code] += 1
        await bench.handler.delete(plan.id, bench.cgroup_parent)
        bench.plans.remove(plan)
    assert ends.keys() <= {134, 143}
    assert ends[143] > 0
    if in_process:
        assert peak < (LIMIT >> 10) + 8192 + 64 * len(guests)
    await until(lambda: descriptors() <= files + 4)
    assert (await bench.finish(bench.artifact(wasm.HELLO))).code == 0


# Modules.


async def tried(bench: WasmBench, module: bytes, data: Path, ahead: Callable[[Entry], None] | None) -> bool:
    """Whether the module could be started; it has been removed then, in either case."""
    plan = bench.artifact(module, linux=limited(LIMIT), mounts=[mount(data, "/data")])
    assert plan.image is not None
    assert plan.image.wasm is not None
    digest = plan.image.wasm.digest
    try:
        if ahead is not None:
            ahead(Entry(str(bench.layout.blob(digest)), digest, ""))
        await bench.handler.create(plan)
        await bench.handler.start(plan.id)
    except (CriShimError, wasmtime.WasmtimeError):
        return False
    else:
        try:
            await asyncio.wait_for(asyncio.shield(bench.end_of(plan)), 0.02)
        except TimeoutError:
            await bench.handler.kill(plan.id, signal.SIGKILL)
        ended = await bench.end_of(plan)
        assert 0 <= ended.code <= 255
        return True
    finally:
        await bench.handler.delete(plan.id, bench.cgroup_parent)
        bench.plans.remove(plan)
        bench.layout.blob(digest).unlink()


@pytest.mark.timeout(count(3600, 120))
@pytest.mark.parametrize("compiler", ["real", "here"])
async def test_modules_that_were_tampered_with(module_root: Path, tmp_path: Path, compiler: str) -> None:
    """Each is refused, or runs and ends. `here`: compiled by this process, which is quicker than one for each."""
    generator = seeded()
    seeds = [wasm.assemble(text) for text in hostile.SEEDS]
    data = tmp_path / "data"
    data.mkdir()
    async with worker_bench(module_root, tmp_path / "state", "/nowhere", isolation="in-process") as bench:
        await bench.finish(bench.artifact(wasm.HELLO))
        cache = bench.handler._cache  # type: ignore[attr-defined]

        def ahead(entry: Entry) -> None:
            if entry.digest in known:
                return
            known.add(entry.digest)
            write_compiled(Path(entry.path).read_bytes(), entry.digest, cache.path(entry))

        known: set[str] = set()
        before = descriptors()
        ran = 0
        total = count(500, 20) if compiler == "real" else count(10_000, 200)
        for _ in range(total):
            module = hostile.mutated(generator.choice(seeds), generator)
            ran += await tried(bench, module, data, ahead if compiler == "here" else None)
        _log.info("%d of %d could be started", ran, total)
        assert 0 < ran < total
        await until(lambda: descriptors() <= before + 4)
        await until(lambda: not [task for task in threading.enumerate() if task.name.startswith("wasm-")])
        assert (await bench.finish(bench.artifact(wasm.HELLO))).code == 0
