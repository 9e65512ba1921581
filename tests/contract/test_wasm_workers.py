"""Wasm containers in processes of their own: the suite of all handlers, and what a process adds.

Real cgroups, namespaces and identities, so all of it needs root.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cri_shim.adapters.process_cgroup import ProcessCgroups
from cri_shim.kernel import namespaces
from cri_shim.model.container import Exit, Reason, User
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import ContainerPlan
from cri_shim.pb import api_pb2 as pb
from tests.contract.handler_suite import HandlerSuite, until
from tests.contract.wasm_bench import WasmBench, limited, mount, secured, worker_bench
from tests.support import leftovers, wasm

pytestmark = pytest.mark.root


@pytest.fixture
async def bench(module_root: Path, tmp_path: Path, run_name: str) -> AsyncIterator[WasmBench]:
    parent = f"/{leftovers.CGROUP_PREFIX}{run_name}/worker"
    async with worker_bench(module_root, tmp_path / "state", parent) as made:
        yield made


class TestWasmWorker(HandlerSuite):
    pass


def pid_of(bench: WasmBench, plan: ContainerPlan) -> int:
    pid = bench.handler.info(plan.id)["pid"]
    assert isinstance(pid, int)
    return pid


def status_of(task: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)


async def test_the_worker_is_the_containers_user_in_every_thread_that_works_for_the_guest(
    bench: WasmBench, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o777)
    data.chmod(0o777)
    plan = bench.artifact(wasm.SLEEP, mounts=[mount(data, "/data")])
    plan = replace(plan, process=replace(plan.process, user=User(uid=1234, gid=4321, groups=(7, 8))))
    await bench.begin(plan)
    await bench.said(plan, "going to sleep")
    pid = pid_of(bench, plan)
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = status_of(task)
        assert status["Uid"].split() == ["1234"] * 4
        assert status["Gid"].split() == ["4321"] * 4
        assert status["Groups"].split() == ["7", "8"]
        assert int(status["CapEff"], 16) == 0
    guest = next(
        task
        for task in Path(f"/proc/{pid}/task").iterdir()
        if (task / "comm").read_text().startswith(f"wasm-{plan.id[:10]}")
    )
    status = status_of(guest)
    assert (int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, "1")
    assert list(Path(f"/proc/{pid}/root").iterdir()) == []


async def test_a_worker_has_little_memory_of_its_own(bench: WasmBench) -> None:
    plans = [await bench.begin(bench.artifact(wasm.SLEEP)) for _ in range(3)]
    for plan in plans:
        await bench.said(plan, "going to sleep")
    for plan in plans[1:]:  # after the first fork a zygote writes to some pages itself
        rollup = Path(f"/proc/{pid_of(bench, plan)}/smaps_rollup").read_text()
        own = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
        assert 0 < own < 3 * 1024, rollup


async def test_files_of_others_are_out_of_reach(bench: WasmBench, tmp_path: Path) -> None:
    """The file calls of a module in the daemon would have passed over the modes."""
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o755)
    (data / "secret").write_text("of root\n")
    (data / "secret").chmod(0o600)
    (data / "open").write_text("for all\n")
    for name, user, said in (("open", 1234, ["for all"]), ("secret", 1234, []), ("secret", 0, ["of root"])):
        plan = bench.artifact(wasm.prints_file(3, name), mounts=[mount(data, "/data", readonly=True)])
        plan = replace(plan, process=replace(plan.process, user=User(uid=user, gid=user)))
        await bench.finish(plan)
        assert bench.text(plan) == said


async def test_root_without_dac_override(bench: WasmBench, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o755)
    (data / "secret").write_text("of somebody\n")
    os.chown(data / "secret", 1234, 1234)
    (data / "secret").chmod(0o600)
    dropped = secured(capabilities=pb.Capability(drop_capabilities=["ALL"]))
    plan = bench.artifact(wasm.prints_file(3, "secret"), mounts=[mount(data, "/data")], linux=dropped)
    await bench.finish(plan)
    assert bench.text(plan) == []


async def test_limits_are_those_of_its_cgroup(bench: WasmBench) -> None:
    linux = pb.LinuxContainerConfig(
        resources=pb.LinuxContainerResources(
            cpu_quota=5_000, cpu_period=100_000, cpu_shares=51, memory_limit_in_bytes=16 << 20, cpuset_cpus="0"
        )
    )
    linux.resources.oom_score_adj = 500
    plan = await bench.begin(bench.artifact(wasm.SLEEP, linux=linux))
    pid = pid_of(bench, plan)
    assert bench.cgroups.processes(bench.cgroup_parent, plan.id) == [pid]
    where = Path(f"/proc/{pid}/cgroup").read_text()
    for name in bench.cgroups.host.controllers:
        assert re.search(rf":(.+,)?{name}(,.+)?:.*/{plan.id}\n", where)
    assert bench.cgroups.memory_limit(bench.cgroup_parent, plan.id) == 16 << 20
    cpu = bench.cgroups.host.controllers["cpu"] / bench.cgroup_parent.strip("/") / plan.id
    assert (cpu / "cpu.cfs_quota_us").read_text() == "5000\n"
    assert (cpu / "cpu.shares").read_text() == "51\n"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "500\n"
    assert os.sched_getaffinity(pid) == {0}
    assert bench.handler.stats(plan.id) is None
    # And while it runs.
    now, wanted = pb.LinuxContainerResources(), pb.LinuxContainerResources()
    now.CopyFrom(linux.resources)
    wanted.CopyFrom(linux.resources)
    wanted.memory_limit_in_bytes, wanted.cpu_quota, wanted.oom_score_adj = 32 << 20, 0, 600
    await bench.handler.update(plan.id, now, wanted)
    assert bench.cgroups.memory_limit(bench.cgroup_parent, plan.id) == 32 << 20
    assert (cpu / "cpu.cfs_quota_us").read_text() == "-1\n"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "600\n"


async def test_a_cgroup_that_it_cannot_enter_is_named_and_nothing_runs(
    bench: WasmBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessCgroups, "doors", lambda *_: ["/sys/fs/cgroup/gone/tasks"])
    plan = bench.artifact(wasm.SLEEP)
    await bench.handler.create(plan)
    with pytest.raises(FailedPrecondition, match=r"cannot make the Wasm worker: .*'/sys/fs/cgroup/gone/tasks'"):
        await bench.handler.start(plan.id)
    await bench.handler.delete(plan.id, bench.cgroup_parent)
    assert list(plan.bundle.iterdir()) == []


async def test_a_refused_limit_is_named_and_nothing_runs(bench: WasmBench) -> None:
    linux = pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(cpuset_cpus="500"))
    plan = bench.artifact(wasm.SLEEP, linux=linux)
    await bench.handler.create(plan)
    with pytest.raises(FailedPrecondition, match=r"'500' for cpuset\.cpus"):
        await bench.handler.start(plan.id)
    await bench.handler.delete(plan.id, bench.cgroup_parent)
    assert list(plan.bundle.iterdir()) == []


async def test_past_its_memory_limit_the_kernel_ends_it(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.TOUCHING_HOG, linux=limited(24 << 20))
    ended = await bench.finish(plan)
    assert (ended.code, ended.reason) == (137, Reason.OOM_KILLED)


async def test_it_is_in_the_pods_network(bench: WasmBench) -> None:
    pins = bench.layout.pod(bench.pod.id) / "ns"
    namespaces.pin_namespaces(pins, net=True, ipc=False, uts=False, hostname="", sysctls={})
    try:
        plan = bench.artifact(wasm.SLEEP)
        await bench.begin(replace(plan, pod=replace(plan.pod, net=pins / "net")))
        assert os.stat(f"/proc/{pid_of(bench, plan)}/ns/net").st_ino == (pins / "net").stat().st_ino
        assert os.stat(f"/proc/{pid_of(bench, plan)}/ns/mnt").st_ino != os.stat("/proc/self/ns/mnt").st_ino
        await bench.handler.kill(plan.id, signal.SIGKILL)
        await bench.end_of(plan)
    finally:
        namespaces.unpin(pins)


@pytest.mark.parametrize("guest", [wasm.SPIN, wasm.SLEEP, wasm.floods(0)], ids=["spin", "sleep", "flood"])
async def test_the_stop_signal_ends_it_whatever_it_does(bench: WasmBench, guest: str) -> None:
    plan = await bench.begin(bench.artifact(guest))
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143


async def test_a_trap_has_its_text_in_status_and_log(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.TRAP)
    ended = await bench.finish(plan)
    assert (ended.code, ended.reason) == (134, Reason.ERROR)
    assert "unreachable" in ended.message
    assert any("unreachable" in line for line in bench.text(plan))


async def test_a_worker_that_somebody_kills_is_told_as_that(bench: WasmBench) -> None:
    plan = await bench.begin(bench.artifact(wasm.SLEEP))
    os.kill(pid_of(bench, plan), signal.SIGABRT)
    ended = await bench.end_of(plan)
    assert (ended.code, ended.reason) == (134, Reason.ERROR)
    assert "SIGABRT" in ended.message


async def test_it_outlives_the_zygote_and_the_daemon(bench: WasmBench) -> None:
    plan = await bench.run(bench.programs.counts())
    await bench.is_ready(plan, "3")
    await bench.restart()
    assert await bench.handler.adopt(bench.record(plan, started_at=5), plan) is None
    before = len(bench.log(plan, "stdout"))
    await until(lambda: len(bench.log(plan, "stdout")) > before + 3)
    # Its log can be rotated by the new daemon too, and its end is told once.
    assert plan.log_path is not None
    plan.log_path.rename(plan.log_path.with_suffix(".1"))
    await bench.handler.reopen_log(plan.id)
    await until(lambda: bool(bench.log(plan, "stdout")))
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143
    assert len(bench.ends[plan.id]) == 1


async def test_an_end_while_no_daemon_ran_is_told_as_it_was(bench: WasmBench) -> None:
    plans = [await bench.run(bench.programs.waits()) for _ in range(2)]
    for plan in plans:
        await bench.is_ready(plan)
    pids = [pid_of(bench, plan) for plan in plans]
    await bench.handler.aclose()
    os.kill(pids[0], signal.SIGKILL)
    bench.handler = bench.make(bench.context())
    found = await bench.handler.adopt(bench.record(plans[1], started_at=5), plans[1])
    assert found is None
    lost = await bench.handler.adopt(bench.record(plans[0], started_at=5), plans[0])
    if not isinstance(lost, Exit):  # it had not quite gone
        lost = await bench.end_of(plans[0])
    assert lost.message == "the worker is gone and left no exit status"


async def test_errors_of_linking_are_errors_of_the_start(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.UNKNOWN_IMPORT)
    await bench.handler.create(plan)
    with pytest.raises(FailedPrecondition, match=r"cannot be linked.*env::launch"):
        await bench.handler.start(plan.id)
    assert bench.cgroups.processes(bench.cgroup_parent, plan.id) == []


async def test_start_is_quick(bench: WasmBench) -> None:
    """Not a measurement: it would take seconds if the engine were loaded anew."""
    took = []
    for _ in range(3):
        plan = bench.artifact(wasm.HELLO)
        await bench.handler.create(plan)
        before = time.monotonic()
        await bench.handler.start(plan.id)
        await bench.end_of(plan)
        took.append(time.monotonic() - before)
    assert min(took) < 2  # one or the other the machine may hold up


# Components.


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        ("(call $say) (i32.const 0)", 0, ["hello from a component"]),
        ("(call $say) (call $say) (i32.const 1)", 1, ["hello from a component"] * 2),
    ],
    ids=["ok", "error"],
)
async def test_a_component_runs_to_its_end(bench: WasmBench, run: str, code: int, said: list[str]) -> None:
    plan = bench.artifact(wasm.component(run))
    ended = await bench.finish(plan)
    assert (ended.code, bench.text(plan)) == (code, said)


@pytest.mark.parametrize(
    "run",
    ["(call $say) (loop $l (br $l)) unreachable", "(call $say) (call $wait) (i32.const 0)"],
    ids=["spin", "sleep"],
)
async def test_a_component_is_stopped_whatever_it_does(bench: WasmBench, run: str) -> None:
    plan = await bench.begin(bench.artifact(wasm.component(run)))
    await bench.said(plan, "hello from a component")
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143


async def test_what_a_stopped_component_has_written_is_in_the_log(bench: WasmBench) -> None:
    text = wasm.component(
        "(call $write (call $get) (i32.const 100) (i32.const 31) (i32.const 0)) (call $wait) (i32.const 0)"
    )
    plan = await bench.begin(bench.artifact(text.replace('component\\0a"', 'component\\0aand more"')))
    await bench.said(plan, "hello from a component")
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143
    assert bench.entries(plan) == [("stdout", "F", "hello from a component"), ("stdout", "P", "and more")]


async def test_the_trap_of_a_component_is_told(bench: WasmBench) -> None:
    plan = bench.artifact(wasm.component("unreachable"))
    ended = await bench.finish(plan)
    assert ended.code == 134
    assert "unreachable" in ended.message
    assert any("unreachable" in line for line in bench.text(plan))


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("works", 0, ""),
        ("fails", 1, ""),
        ("nothing", 0, ""),
        ("takes", None, "'takes' takes parameters"),
        ("gives", None, "gives back what is no exit code"),
        ("other", None, "exports no function 'other'.*which exports fails, gives, nothing, takes, works"),
        ("wasi:cli/run@0.2.0", None, "exports no function 'wasi:cli/run@0.2.0'"),
    ],
)
async def test_a_function_of_a_component(bench: WasmBench, function: str, code: int | None, words: str) -> None:
    plan = bench.artifact(wasm.COMPONENT_FUNCTIONS, f"m#{function}")
    await bench.handler.create(plan)
    if code is None:
        with pytest.raises(FailedPrecondition, match=words):
            await bench.handler.start(plan.id)
    else:
        await bench.handler.start(plan.id)
        assert (await bench.end_of(plan)).code == code


@pytest.mark.parametrize(
    ("export", "words"),
    [("a:b/c@0.2.0", "exports neither wasi:cli/run"), ("wasi:cli/run@0.3.0", "exports neither wasi:cli/run")],
)
async def test_components_of_other_worlds_are_refused_by_name(bench: WasmBench, export: str, words: str) -> None:
    text = wasm.component("(i32.const 0)").replace("wasi:cli/run@0.2.0", export)
    plan = bench.artifact(text)
    await bench.handler.create(plan)
    with pytest.raises(FailedPrecondition, match=words):
        await bench.handler.start(plan.id)
