"""The wasmtime handler with the real engine and zygote: what a guest is given, and how it ends. Needs no root."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import pytest

from cri_shim.kernel import fs
from cri_shim.model.container import Exit, Reason, User
from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.handler import ContainerPlan, ProcessPlan
from cri_shim.model.ids import new_container_id
from cri_shim.pb import api_pb2 as pb
from tests.contract.handler_suite import HandlerSuite, until
from tests.contract.wasm_bench import WasmBench, descriptors, limited, wasm_bench
from tests.support import wasm


@pytest.fixture
async def bench(module_root: Path, tmp_path: Path) -> AsyncIterator[WasmBench]:
    async with wasm_bench(module_root, tmp_path / "state") as made:
        yield made


class TestWasmHandler(HandlerSuite):
    pass


# What a guest is given.


async def test_hello_is_in_the_log_when_the_exit_is_told(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.HELLO)
    before = time.time_ns()
    ended = await bench.finish(plan)
    assert (ended.code, ended.reason, ended.message) == (0, Reason.COMPLETED, "")
    assert before < ended.at <= time.time_ns()
    assert bench.entries(plan) == [("stdout", "F", "hello from wasm")]


async def test_the_working_directory_is_told_as_pwd(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.ECHO, "m")
    plan = replace(plan, process=replace(plan.process, cwd="/srv", env=("A=1",)))
    await bench.finish(plan)
    assert bench.text(plan) == ["m", "A=1", "PWD=/srv"]


async def test_streams_and_the_unterminated_line(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.STDERR)
    await bench.finish(plan)
    log = bench.entries(plan)
    # Of two pipes that have something at the same moment either can be the first.
    assert sorted(log) == [("stderr", "F", "to stderr"), ("stdout", "F", "to stdout"), ("stdout", "P", "no newline")]
    assert [entry for entry in log if entry[0] == "stdout"][-1] == ("stdout", "P", "no newline")


async def test_standard_input_is_at_its_end(bench: WasmBench) -> None:
    assert (await bench.finish(bench.artifact(wasm.STDIN))).code == 0


async def test_another_function_of_a_library(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.LIBRARY, "lib.wasm#serve")
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == ["initialised"]


async def test_sleeping_takes_the_time_of_the_guests_own_clock(bench: WasmBench) -> None:
    assert (await bench.finish(bench.artifact(wasm.CLOCK))).code == 0


async def test_wrong_arguments_of_poll_oneoff_are_errors_of_the_call(bench: WasmBench) -> None:
    assert (await bench.finish(bench.artifact(wasm.BAD_POLL))).code == 0


# How it ends.


@pytest.mark.parametrize(("asked", "code"), [(0, 0), (1, 1), (7, 7), (126, 126), (137, 137), (255, 255), (300, 44)])
async def test_exit_codes(bench: WasmBench, asked: int, code: int) -> None:
    plan = bench.artifact(wasm.exits(asked))
    ended = await bench.finish(plan)
    assert (ended.code, ended.reason) == (code, Reason.ERROR if code else Reason.COMPLETED)
    assert bench.entries(plan) == []


async def test_a_trap_is_134_with_the_backtrace_in_message_and_log(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.TRAP)
    ended = await bench.finish(plan)
    assert (ended.code, ended.reason) == (134, Reason.ERROR)
    assert "wasm backtrace" in ended.message
    assert "!deeper" in ended.message
    assert "`unreachable`" in ended.message
    assert [stream for stream, _, _ in bench.entries(plan)] == ["stderr"] * len(ended.message.splitlines())
    assert bench.text(plan) == ended.message.splitlines()


async def test_a_trap_in_the_modules_own_start_is_the_same(bench: WasmBench) -> None:
    assert (await bench.finish(bench.artifact(wasm.STARTS_AT_ONCE))).code == 134


async def test_endless_recursion_is_a_trap_and_no_crash(bench: WasmBench) -> None:
    ended = await bench.finish(bench.artifact(wasm.RECURSE))
    assert ended.code == 134
    assert "stack" in ended.message


@pytest.mark.parametrize("guest", [wasm.HOG, wasm.HUGE], ids=["grows", "huge from the start"])
async def test_memory_limit_is_oom_killed(bench: WasmBench, guest: str) -> None:
    ended = await bench.finish(bench.artifact(guest, linux=limited(10 << 20)))
    assert (ended.code, ended.reason) == (137, Reason.OOM_KILLED)


async def test_memory_limit_of_the_pod_holds_where_the_container_has_none(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.HUGE)
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=10 << 20)
    config = pb.PodSandboxConfig(linux=pb.LinuxPodSandboxConfig(resources=resources))
    ended = await bench.finish(replace(plan, pod=replace(plan.pod, config=config)))
    assert ended.reason is Reason.OOM_KILLED


async def test_a_trap_below_the_limit_is_not_out_of_memory(bench: WasmBench) -> None:
    ended = await bench.finish(bench.artifact(wasm.TRAP, linux=limited(10 << 20)))
    assert (ended.code, ended.reason) == (134, Reason.ERROR)


@pytest.mark.parametrize("guest", [wasm.SPIN, wasm.SLEEP, wasm.floods(0)], ids=["busy", "asleep", "writing"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
async def test_a_signal_ends_it_at_once(bench: WasmBench, guest: str, number: int) -> None:
    container = await bench.begin(bench.artifact(guest))
    await asyncio.sleep(0.02)
    before = time.monotonic()
    await bench.handler.kill(container.id, number)
    ended = await bench.end_of(container)
    assert (ended.code, ended.reason, ended.message) == (128 + number, Reason.ERROR, "")
    assert time.monotonic() - before < _LOADED


async def test_a_signal_before_it_runs(bench: WasmBench) -> None:
    for _ in range(20):
        plan = bench.artifact(wasm.SPIN)
        await bench.handler.create(plan)
        starting = asyncio.create_task(bench.handler.start(plan.id))
        await asyncio.sleep(0)
        await bench.handler.kill(plan.id, signal.SIGKILL)
        await starting
        assert (await bench.end_of(plan)).code == 137


async def test_only_the_first_signal_counts(bench: WasmBench) -> None:
    container = await bench.begin(bench.artifact(wasm.SLEEP))
    await bench.handler.kill(container.id, signal.SIGTERM)
    await bench.handler.kill(container.id, signal.SIGKILL)
    assert (await bench.end_of(container)).code == 143


@pytest.mark.parametrize("number", [0, signal.SIGCHLD, signal.SIGWINCH, signal.SIGSTOP, signal.SIGCONT])
async def test_signals_that_end_nothing(bench: WasmBench, number: int) -> None:
    container = await bench.begin(bench.artifact(wasm.SLEEP))
    await bench.handler.kill(container.id, number)
    await asyncio.sleep(0.05)
    assert container.id not in bench.ends


async def test_the_stop_signal_ends_it_whatever_it_is(bench: WasmBench) -> None:
    container = await bench.begin(replace(bench.artifact(wasm.SLEEP), stop_signal=signal.SIGWINCH))
    await bench.handler.kill(container.id, signal.SIGWINCH)
    assert (await bench.end_of(container)).code == 128 + signal.SIGWINCH


async def test_killing_what_does_not_run_is_success(bench: WasmBench) -> None:
    await bench.handler.kill(new_container_id(), signal.SIGTERM)
    plan = bench.artifact(wasm.HELLO)
    await bench.handler.create(plan)
    await bench.handler.kill(plan.id, signal.SIGKILL)
    assert plan.id not in bench.ends
    await bench.handler.start(plan.id)
    assert (await bench.end_of(plan)).code == 0
    await bench.handler.kill(plan.id, signal.SIGKILL)


# Many at once.


async def test_two_hundred_guests_each_get_their_own_end(bench: WasmBench) -> None:
    plans: dict[int, ContainerPlan] = {}
    for number in range(200):
        guest = (wasm.EXITS_WITH_ARGC, wasm.TRAP, wasm.SPIN, wasm.SLEEP)[number % 4]
        plans[number] = bench.artifact(guest, *["x"] * (number + 1))
        await bench.handler.create(plans[number])
    wanted = {number: (number + 1, 134, 143, 143)[number % 4] for number in plans}
    await asyncio.gather(*(bench.handler.start(plan.id) for plan in plans.values()))
    await asyncio.gather(
        *(bench.handler.kill(plan.id, signal.SIGTERM) for number, plan in plans.items() if wanted[number] == 143)
    )
    ended = {number: await bench.end_of(plan) for number, plan in plans.items()}
    assert {number: end.code for number, end in ended.items()} == wanted
    assert all("!deeper" in end.message for end in ended.values() if end.code == 134)
    assert all(len(told) == 1 for told in bench.ends.values())


async def test_a_busy_guest_does_not_hold_up_the_event_loop(bench: WasmBench) -> None:
    await bench.begin(bench.artifact(wasm.SPIN))
    await bench.begin(bench.artifact(wasm.floods(0)))
    turns = []
    for _ in range(50):
        before = time.monotonic()
        await asyncio.sleep(0.002)
        turns.append(time.monotonic() - before)
    assert statistics.median(turns) < 0.5  # a single one the machine may hold up


async def test_nothing_is_left_of_a_guest(bench: WasmBench) -> None:
    async def round_trip() -> None:
        for guest in (wasm.HELLO, wasm.TRAP, wasm.exits(3)):
            plan = bench.artifact(guest)
            await bench.finish(plan)
            await bench.handler.delete(plan.id, "")
            fs.remove_tree(plan.bundle)  # as the caller does; not with a mount in it

    await round_trip()
    before = descriptors()
    for _ in range(5):
        await round_trip()
    await until(lambda: descriptors() <= before and guest_threads() == [])


async def test_guests_run_at_a_lower_weight_and_under_their_name(bench: WasmBench) -> None:
    plan = await bench.begin(bench.artifact(wasm.SPIN))
    (task,) = guest_threads()
    assert (task / "comm").read_text() == f"wasm-{plan.id[:10]}\n"
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    assert int(fields[16]) == 5  # proc_pid_stat(5): nice; that of the loop, which comes before them, is not inherited
    assert os.sched_getscheduler(int(task.name)) == os.SCHED_BATCH


async def test_cpus_that_are_not_there_are_an_error_of_the_start(bench: WasmBench) -> None:
    linux = pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(cpuset_cpus="1023"))
    plan = bench.artifact(wasm.HELLO, linux=linux)
    await bench.handler.create(plan)
    with pytest.raises(FailedPrecondition, match="cpuset_cpus"):
        await bench.handler.start(plan.id)


async def test_limits_that_only_a_cgroup_has_are_refused(bench: WasmBench) -> None:
    plan = await bench.begin(bench.artifact(wasm.SLEEP))
    wanted = pb.LinuxContainerResources(unified={"memory.high": "1000000"})
    with pytest.raises(InvalidArgument, match="unified"):
        await bench.handler.update(plan.id, pb.LinuxContainerResources(), wanted)


async def test_the_memory_limit_of_a_running_module(bench: WasmBench) -> None:
    plan = await bench.begin(bench.artifact(wasm.GROWS, linux=limited(1 << 20)))

    def uses(size: int) -> bool:
        stats = bench.handler.stats(plan.id)
        return stats is not None and stats.memory == size

    def limit(size: int) -> pb.LinuxContainerResources:
        return limited(size).resources

    await until(lambda: uses(1 << 20))
    await bench.handler.update(plan.id, limit(1 << 20), limit(2 << 20))
    await until(lambda: uses(2 << 20))
    with pytest.raises(
        FailedPrecondition, match=r"memory_limit_in_bytes: the module uses 2097152 bytes, more than 1048"
    ):
        await bench.handler.update(plan.id, limit(2 << 20), limit(1 << 20))
    for size in range(3 << 20, 4 << 20, 1 << 16):
        await bench.handler.update(plan.id, limit(2 << 20), limit(size))
    await until(lambda: uses((4 << 20) - (1 << 16)))
    stats = bench.handler.stats(plan.id)
    assert stats is not None
    assert stats.memory_limit == (4 << 20) - (1 << 16)
    await bench.handler.update(plan.id, limit(size), pb.LinuxContainerResources())
    await until(lambda: not uses(size))
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143


_LOADED: Final = 30.0
"""Seconds that a loaded machine may need for what takes one."""


def quota(microseconds: int) -> pb.LinuxContainerResources:
    return pb.LinuxContainerResources(cpu_quota=microseconds, cpu_period=100_000)


async def share(bench: WasmBench, plan: ContainerPlan, seconds: float) -> float:
    """CPU time per time of a guest, from now on."""
    stats = bench.handler.stats(plan.id)
    assert stats is not None
    cpu, began = stats.cpu_ns, time.monotonic_ns()
    await asyncio.sleep(seconds)
    stats = bench.handler.stats(plan.id)
    assert stats is not None
    return (stats.cpu_ns - cpu) / (time.monotonic_ns() - began)


async def computed(bench: WasmBench, plan: ContainerPlan, cpu_ns: int) -> None:
    """Wait until a guest has used so much more."""

    def used() -> int:
        stats = bench.handler.stats(plan.id)
        assert stats is not None
        return stats.cpu_ns

    before = used()
    while used() - before < cpu_ns:
        await asyncio.sleep(0.01)


def rests(plan: ContainerPlan) -> int:
    """How often a guest has given up the CPU by itself (proc(5), voluntary_ctxt_switches), as no busy one does."""
    (task,) = (task for task in guest_threads() if (task / "comm").read_text() == f"wasm-{plan.id[:10]}\n")
    (line,) = (line for line in (task / "status").read_text().splitlines() if line.startswith("voluntary"))
    return int(line.split()[1])


async def test_a_guest_gets_no_more_cpu_than_its_quota(bench: WasmBench) -> None:
    """Sooner or later: what it got too much when nobody looked in time, it pays off. Likewise the quota of the pod."""
    five = bench.artifact(wasm.SPIN, linux=pb.LinuxContainerConfig(resources=quota(5_000)))
    of_pod = bench.artifact(wasm.SPIN)
    config = pb.PodSandboxConfig(linux=pb.LinuxPodSandboxConfig(resources=quota(5_000)))
    of_pod = replace(of_pod, pod=replace(of_pod.pod, config=config))
    for plan in (five, of_pod):
        await bench.begin(plan)
    async with asyncio.timeout(_LOADED):
        while max(await asyncio.gather(*(share(bench, plan, 1.0) for plan in (five, of_pod)))) >= 0.08:
            pass
    # Changed while it runs, both ways. Without a quota it rests no more; what it gets then is up to the machine's load.
    await bench.handler.update(five.id, quota(5_000), pb.LinuxContainerResources())
    async with asyncio.timeout(2 * _LOADED):
        rested = -1
        while rests(five) != rested:
            rested = rests(five)
            await computed(bench, five, 50_000_000)
    await bench.handler.update(five.id, pb.LinuxContainerResources(), quota(2_000))
    async with asyncio.timeout(_LOADED):
        while await share(bench, five, 1.0) >= 0.05:
            pass
    # A guest that pays off its debt ends as promptly as any other.
    before = time.monotonic()
    await bench.handler.kill(five.id, signal.SIGTERM)
    assert (await bench.end_of(five)).code == 143
    assert time.monotonic() - before < _LOADED


async def test_a_sleeping_guest_with_a_quota_is_not_looked_at(bench: WasmBench) -> None:
    plan = await bench.begin(bench.artifact(wasm.SLEEP, linux=pb.LinuxContainerConfig(resources=quota(5_000))))
    await bench.said(plan, "going to sleep")
    await until(lambda: "wasm-throttle" in {thread.name for thread in threading.enumerate()})
    (clock,) = (
        time.pthread_getcpuclockid(t.ident) for t in threading.enumerate() if t.name == "wasm-throttle" and t.ident
    )

    async def used(seconds: float) -> int:
        before = time.clock_gettime_ns(clock)
        await asyncio.sleep(seconds)
        return time.clock_gettime_ns(clock) - before

    async with asyncio.timeout(_LOADED):
        while await used(0.3) >= 1_000_000:  # at first it was still going to sleep
            pass
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143


def guest_threads() -> list[Path]:
    tasks = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it ends while we look
            if (task / "comm").read_text().startswith("wasm-"):
                tasks.append(task)
    return tasks


# Starting, removing, adopting.


async def test_errors_of_linking_are_errors_of_the_start(bench: WasmBench) -> None:
    for module, args, words in (
        (wasm.UNKNOWN_IMPORT, ("m",), "cannot be linked.*env::launch.*build it for wasm32-wasip1"),
        (wasm.WASMEDGE_SOCKET, ("m",), "cannot be linked.*sock_connect.*WasmEdge's own"),
        (wasm.LIBRARY, ("m",), "exports no function '_start'.*which exports _initialize, serve: module.wasm#FUNCTION"),
        (wasm.LIBRARY, ("m#nothing",), "exports no function 'nothing'"),
        (wasm.LIBRARY, ("m#needs",), "takes parameters"),
    ):
        plan = bench.artifact(module, *args)
        await bench.handler.create(plan)
        with pytest.raises(FailedPrecondition, match=words):
            await bench.handler.start(plan.id)
        await bench.handler.delete(plan.id, "")
        assert plan.id not in bench.ends


async def test_a_log_that_cannot_be_opened_is_an_error_of_the_start(bench: WasmBench, tmp_path: Path) -> None:
    plan = replace(bench.artifact(wasm.HELLO), log_path=tmp_path / "missing" / "log")
    await bench.handler.create(plan)
    counts = []
    for _ in range(3):  # a start that failed leaves no descriptor, and can be tried again
        with pytest.raises(FailedPrecondition, match=r"cannot open the container's log .*/missing/log: No such file"):
            await bench.handler.start(plan.id)
        await until(lambda: guest_threads() == [])
        counts.append(descriptors())
    assert counts[-1] == counts[0]


async def test_a_second_start_is_an_error(bench: WasmBench) -> None:
    plan = await bench.begin(bench.artifact(wasm.SLEEP))
    with pytest.raises(FailedPrecondition, match="has been started before"):
        await bench.handler.start(plan.id)


async def test_the_log_of_a_container_that_does_not_run_is_not_reopened(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.HELLO)
    await bench.finish(plan)
    with pytest.raises(FailedPrecondition, match="not running"):
        await bench.handler.reopen_log(plan.id)


async def test_a_later_daemon_finds_created_containers_and_has_lost_running_ones(bench: WasmBench) -> None:
    created, running = bench.artifact(wasm.ECHO, "m", "arg", env=["A=1"]), bench.artifact(wasm.SLEEP)
    await bench.handler.create(created)
    await bench.begin(running)
    await bench.restart()
    assert bench.ends == {}

    # What the store keeps of a plan: the process is not part of it.
    forgotten = ProcessPlan(args=(), env=(), cwd="/", user=User())
    found = await bench.handler.adopt(bench.record(created, started_at=0), replace(created, process=forgotten))
    assert found is None
    lost = await bench.handler.adopt(bench.record(running, started_at=2), replace(running, process=forgotten))
    assert isinstance(lost, Exit)
    assert (lost.code, lost.reason) == (255, Reason.UNKNOWN)
    assert "daemon restarted" in lost.message

    await bench.handler.start(created.id)
    assert (await bench.end_of(created)).code == 0
    assert bench.text(created) == ["m", "arg", "A=1"]


async def test_a_created_container_whose_preparation_is_gone_is_lost(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.HELLO)
    lost = await bench.handler.adopt(bench.record(plan, started_at=0), plan)
    assert isinstance(lost, Exit)
    assert (lost.code, lost.reason) == (255, Reason.UNKNOWN)


async def test_closing_ends_five_hundred_guests_side_by_side(bench: WasmBench) -> None:
    plans = [bench.artifact(wasm.SLEEP) for _ in range(500)]
    for plan in plans:
        await bench.handler.create(plan)
    for plan in plans:
        await bench.handler.start(plan.id)
    before = time.monotonic()
    await bench.handler.aclose()
    assert time.monotonic() - before < _LOADED
    assert bench.ends == {}


async def test_verbose_status(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.SLEEP, linux=limited(64 << 20))
    await bench.begin(plan)
    info = bench.handler.info(plan.id)
    assert (info["placement"], info["placementReason"]) == ("in-process", "the handler's option isolation")
    assert info["memoryLimit"] == 64 << 20
    assert msgspec.json.decode(msgspec.json.encode(info)) == info
    assert bench.handler.info(new_container_id()) == {}


# What it uses.


async def test_the_clock_of_a_busy_guest_and_the_memory_of_a_sleeping_one(bench: WasmBench) -> None:
    created = bench.artifact(wasm.SLEEP)
    await bench.handler.create(created)
    assert bench.handler.stats(created.id) is None
    busy = await bench.begin(bench.artifact(wasm.SPIN))
    asleep = await bench.begin(bench.artifact(wasm.GROWN, linux=limited(64 << 20)))
    await bench.said(asleep, "going to sleep")

    def cpu(plan: ContainerPlan) -> int:
        stats = bench.handler.stats(plan.id)
        assert stats is not None
        return stats.cpu_ns

    await until(lambda: cpu(busy) > 50_000_000)
    assert cpu(asleep) < 50_000_000
    stats = bench.handler.stats(asleep.id)
    assert stats is not None
    assert (stats.memory, stats.memory_limit) == ((256 + 1) << 16, 64 << 20)
    await bench.handler.kill(busy.id, signal.SIGKILL)
    await bench.end_of(busy)
    last = bench.handler.stats(busy.id)
    assert last is not None
    assert last.cpu_ns > 50_000_000
    assert last.memory == 0
    await asyncio.sleep(0.02)
    assert bench.handler.stats(busy.id) == last


async def test_figures_may_be_read_while_guests_end(bench: WasmBench) -> None:
    """The engine's memory must not be touched once its store is closed."""
    plans = [bench.artifact(wasm.HELLO if number % 2 else wasm.HOG, linux=limited(4 << 20)) for number in range(40)]
    reading = True

    def read() -> int:
        seen = 0
        while reading:
            for plan in plans:
                stats = bench.handler.stats(plan.id)
                seen = max(seen, stats.memory if stats is not None else 0)
        return seen

    reader = asyncio.create_task(asyncio.to_thread(read))
    for plan in plans:
        await bench.begin(plan)
    for plan in plans:
        await bench.end_of(plan)
    reading = False
    assert await reader <= 4 << 20
    assert all(stats is not None and stats.cpu_ns for stats in (bench.handler.stats(plan.id) for plan in plans))
