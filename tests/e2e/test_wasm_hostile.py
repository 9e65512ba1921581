"""Guests that mean harm, on a whole daemon: it serves on, keeps what is its own, and says how each of them ended.

What a guest can do by itself is held by `tests/contract/test_wasm_hostile.py`; here is what concerns the daemon and the
node. Small numbers by default, those of the requirement under `scripts/test --full`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import hostile, images, leftovers
from tests.support import wasm as guests
from tests.support.cri import Pod, container_config, fault, whole_lines
from tests.support.expect import eventually
from tests.support.images import Registry
from tests.support.scale import count, seeded

pytestmark = pytest.mark.root

ISOLATION = pytest.mark.parametrize("isolation", ["in-process", "process"])
EDGE = pb.LinuxContainerResources(cpu_quota=5_000, cpu_period=100_000, memory_limit_in_bytes=10 << 20)
"""The limits of an edge node's Wasm pod: 50m, 10Mi."""


def pod_of(lab: Lab, isolation: str = "in-process") -> Pod:
    config = lab.pod_config()
    if isolation == "process":
        config.annotations["cri-shim.io/isolation"] = isolation
    return lab.pod("wasm", config=config)


def image(lab: Lab, registry: Registry, name: str, module: str) -> str:
    reference = registry.push_wasm(f"hostile/{name}:1", module)
    lab.cri.pull(reference)
    return reference


def details(lab: Lab, container: str) -> Mapping[str, Any]:
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    found: Mapping[str, Any] = json.loads(lab.cri.runtime.ContainerStatus(request).info["info"])
    return found


def tasks_of(pid: int) -> Iterator[tuple[Path, str]]:
    """The threads of a process with their names."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it ends while we look
            yield task, (task / "comm").read_text().strip()


def guest_tasks(lab: Lab) -> list[Path]:
    return [task for task, name in tasks_of(lab.daemon.pid) if name.startswith("wasm-") and name != "wasm-throttle"]


def pss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def cpu_seconds(task: Path) -> float:
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_daemon_is_in_no_cgroup_of_a_pod(lab: Lab, registry: Registry) -> None:
    """The kubelet kills every process that it finds below a pod's cgroup; on v1 a thread there is its process."""
    spin = image(lab, registry, "spin", guests.SPIN)
    for isolation in ("in-process", "process"):
        pod = pod_of(lab, isolation)
        for number in range(5):
            config = container_config(spin, name=f"c{number}")
            config.linux.resources.CopyFrom(EDGE)
            config.linux.resources.cpu_shares = 51
            lab.cri.run(pod, config)
    exec_in = lab.cri.containers()[0].id
    lab.cri.runtime.ExecSync.future(pb.ExecSyncRequest(container_id=exec_in, cmd=["x.wasm"], timeout=5), timeout=10)
    tasks = guest_tasks(lab)
    assert len(tasks) == 5
    ours = {str(lab.daemon.pid), *(task.name for task, _ in tasks_of(lab.daemon.pid))}
    parent = lab.daemon.cgroup_parent.strip("/")
    seen = 0
    for root in (leftovers.CGROUPS, *leftovers.CGROUPS.iterdir()):
        for file in (*(root / parent).rglob("cgroup.procs"), *(root / parent).rglob("tasks")):
            members = set(file.read_text().split())
            seen += len(members)
            assert not members & ours, file
    assert seen >= 5
    # They are below the daemon's own, together.
    eventually(lambda: all("/cri-shim-threads\n" in (task / "cgroup").read_text() for task in tasks))
    main = Path(f"/proc/{lab.daemon.pid}/task/{lab.daemon.pid}/cgroup").read_text()
    assert "cri-shim-threads" not in main


@ISOLATION
def test_the_limits_of_an_edge_node_hold(lab: Lab, registry: Registry, isolation: str) -> None:
    """10Mi and 50m: by the daemon's memory and the clock of the guest's thread, or by the cgroup of the worker."""
    spin = image(lab, registry, "spin", guests.SPIN)
    hog = image(lab, registry, "hog", guests.TOUCHING_HOG)
    pod = pod_of(lab, isolation)

    def run(reference: str, name: str) -> str:
        config = container_config(reference, name=name)
        config.linux.resources.CopyFrom(EDGE)
        return lab.cri.run(pod, config)

    warm = lab.cri.wait_exit(run(hog, "warm"), within=60)
    assert (warm.exit_code, warm.reason) == (137, "OOMKilled")
    before = pss_kib(lab.daemon.pid)
    busy = run(spin, "busy")
    peak = 0
    for number in range(count(20, 3)):
        container = run(hog, f"hog-{number}")
        while lab.cri.status(container).state == pb.CONTAINER_RUNNING:
            peak = max(peak, pss_kib(lab.daemon.pid) - before)
        status = lab.cri.status(container)
        assert (status.exit_code, status.reason) == (137, "OOMKilled")
    # The memory of one guest, and some of what the daemon keeps of each container.
    assert peak < (10 << 10) + 4096
    if isolation == "in-process":
        (task,) = guest_tasks(lab)

        def used() -> float:
            return cpu_seconds(task)
    else:
        pid = details(lab, busy)["pid"]
        for most in leftovers.CGROUPS.glob(f"memory/{lab.daemon.cgroup_parent}/{busy}/memory.max_usage_in_bytes"):
            assert int(most.read_text()) <= 10 << 20

        def used() -> float:
            return cpu_seconds(Path(f"/proc/{pid}"))

    begin, at = used(), time.monotonic()
    time.sleep(count(10, 2))
    eventually(lambda: used() - begin < 0.06 * (time.monotonic() - at))  # what it got too much it pays off
    assert lab.cri.status(busy).state == pb.CONTAINER_RUNNING


def test_stats_are_right_and_quick_while_many_compute(lab: Lab, registry: Registry) -> None:
    spin = image(lab, registry, "spin", guests.SPIN)
    grown = image(lab, registry, "grown", guests.GROWN)
    pod = pod_of(lab)
    config = container_config(grown, name="grown")
    config.linux.resources.memory_limit_in_bytes = 64 << 20
    sleeper = lab.cri.run(pod, config)
    lab.cri.wait_log(sleeper, "going to sleep")
    busy = [lab.cri.run(pod, container_config(spin, name=f"c{number}")) for number in range(count(100, 10))]

    def listed() -> Mapping[str, pb.ContainerStats]:
        answer = lab.cri.runtime.ListContainerStats(pb.ListContainerStatsRequest(), timeout=30)
        return {stats.attributes.id: stats for stats in answer.stats}

    eventually(lambda: all(listed()[each].cpu.usage_core_nano_seconds.value > 1_000_000 for each in busy), within=60)
    begin = time.monotonic()
    stats = listed()
    assert time.monotonic() - begin < 25
    clocks = {each: stats[each].cpu.usage_core_nano_seconds.value for each in busy}
    threads = {name.removeprefix("wasm-"): cpu_seconds(task) for task, name in tasks_of(lab.daemon.pid)}
    for each, nanoseconds in clocks.items():
        assert nanoseconds / 1e9 <= threads[each[:10]] + 0.02
    memory = stats[sleeper].memory
    assert memory.usage_bytes.value == 257 << 16
    # It has touched a page or two of what it has; how much the kernel gives for that is the kernel's affair.
    assert 0 < memory.working_set_bytes.value <= memory.usage_bytes.value
    assert memory.available_bytes.value == (64 << 20) - memory.working_set_bytes.value
    of_pod = lab.cri.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod.id), timeout=30).stats.linux
    assert of_pod.cpu.usage_core_nano_seconds.value >= sum(clocks.values())
    assert len(of_pod.containers) == len(busy) + 1


def test_a_killed_daemon_finds_its_workers_and_says_what_was_lost_in_it(lab: Lab, registry: Registry) -> None:
    sleep = image(lab, registry, "sleep", guests.SLEEP)
    apart, inside = pod_of(lab, "process"), pod_of(lab)
    workers = [lab.cri.run(apart, container_config(sleep, name=f"w{number}")) for number in range(count(50, 8))]
    lost = [lab.cri.run(inside, container_config(sleep, name=f"t{number}")) for number in range(count(50, 8))]
    pids = {container: details(lab, container)["pid"] for container in workers}
    lab.daemon.kill()
    gone = workers[0]
    os.kill(pids[gone], signal.SIGKILL)
    lab.daemon.start()
    with lab.daemon.client() as cri:
        for container in lost:
            status = cri.status(container)
            assert (status.exit_code, status.reason) == (255, "Unknown")
            assert "the daemon restarted" in status.message
        status = cri.wait_exit(gone)
        assert status.exit_code == 255
        assert "left no exit status" in status.message
        for container in workers[1:]:
            assert cri.status(container).state == pb.CONTAINER_RUNNING
            assert details(Lab(lab.daemon, cri, "", ""), container)["pid"] == pids[container]
        cri.stop_pod(apart)
        assert {cri.status(container).exit_code for container in workers[1:]} <= {137, 143}
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()))


def test_what_kills_a_worker_is_told(lab: Lab, registry: Registry) -> None:
    sleep = image(lab, registry, "sleep", guests.SLEEP)
    pod = pod_of(lab, "process")
    for number, (code, words) in {
        signal.SIGSEGV: (139, "SIGSEGV"),
        signal.SIGKILL: (137, "SIGKILL"),
        signal.SIGBUS: (135, "SIGBUS"),
    }.items():
        container = lab.cri.run(pod, container_config(sleep, name=number.name.lower()))
        pid = details(lab, container)["pid"]
        # The engine looks at the first fault, which is not its own, and leaves the next one to the kernel.
        with contextlib.suppress(ProcessLookupError):
            while lab.cri.status(container).state == pb.CONTAINER_RUNNING:
                os.kill(pid, number)
                time.sleep(0.05)
        status = lab.cri.wait_exit(container)
        assert (status.exit_code, status.reason) == (code, "Error")
        assert words in status.message


def test_a_zygote_that_is_killed_is_replaced_and_its_workers_go_on(lab: Lab, registry: Registry) -> None:
    sleep = image(lab, registry, "sleep", guests.SLEEP)
    pod = pod_of(lab, "process")
    before = lab.cri.run(pod, container_config(sleep, name="before"))
    pid = details(lab, before)["pid"]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert b"zygote" in Path(f"/proc/{parent}/cmdline").read_bytes()
    os.kill(parent, signal.SIGKILL)
    after = lab.cri.run(pod, container_config(sleep, name="after"))
    for container in (before, after):
        assert lab.cri.status(container).state == pb.CONTAINER_RUNNING
        lab.cri.stop(container, 10)
        assert lab.cri.status(container).exit_code == 143


@pytest.mark.timeout(count(1800, 120))
@ISOLATION
def test_a_flood_of_output_fills_nothing_but_its_log(lab: Lab, registry: Registry, isolation: str) -> None:
    """What comes is written as it comes; who rotates the log, as the kubelet does, has the disk in hand."""
    total = count(2 << 30, 64 << 20)
    flood = image(lab, registry, "flood", guests.floods(total // 100))
    lab.cri.wait_exit(lab.cri.run(pod_of(lab, isolation), container_config(image(lab, registry, "hi", guests.HELLO))))
    before = pss_kib(lab.daemon.pid)
    container = lab.cri.run(pod_of(lab, isolation), container_config(flood))
    path = Path(lab.cri.status(container).log_path)
    written = peak = 0
    reopen = pb.ReopenContainerLogRequest(container_id=container)
    while lab.cri.status(container).state == pb.CONTAINER_RUNNING:
        peak = max(peak, pss_kib(lab.daemon.pid) - before)
        if path.stat().st_size > 16 << 20:
            path.rename(path.with_suffix(".1"))
            with contextlib.suppress(Exception):  # it may just have ended
                lab.cri.runtime.ReopenContainerLog(reopen, timeout=60)
            written += path.with_suffix(".1").stat().st_size
        time.sleep(0.02)
    if path.exists():
        written += path.stat().st_size
    assert lab.cri.status(container).exit_code == 0
    assert peak < 8192
    header = len("2026-01-01T00:00:00.000000000Z stdout F ")
    assert written >= total + total // 100 * header - (1 << 20)
    assert whole_lines(lab.cri.log(container))[-1:] in ([], ["x" * 99])


@pytest.mark.timeout(count(3600, 180))
@ISOLATION
def test_images_whose_module_was_tampered_with(lab: Lab, registry: Registry, isolation: str) -> None:
    """Each is refused with a cause, or runs and ends when it is to; the daemon goes on, and nothing is left of any."""
    generator = seeded()
    texts = [
        *hostile.SEEDS,
        guests.component("(call $say) (i32.const 0)"),
        guests.component("(call $wait) (i32.const 0)"),
    ]
    seeds = [guests.assemble(text) for text in texts]
    pod = pod_of(lab, isolation)
    good = image(lab, registry, "good", guests.HELLO)
    pid, outcomes = lab.daemon.pid, Counter[str]()
    assert lab.cri.wait_exit(lab.cri.run(pod, container_config(good, name="before"))).exit_code == 0
    before = len(os.listdir(f"/proc/{pid}/fd"))
    for number in range(count(1000, 12)):
        module = hostile.mutated(generator.choice(seeds), generator)
        reference = registry.push(f"hostile/mutant-{isolation}-{number}:1", images.wasm_artifact(module))
        lab.cri.pull(reference)
        config = container_config(reference, name=f"c{number}")
        config.linux.resources.CopyFrom(EDGE)
        container = ""
        try:
            container = lab.cri.create(pod, config)
            lab.cri.start(container)
        except grpc.RpcError as error:
            code, words = fault(error)
            assert code in {
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.FAILED_PRECONDITION,
                grpc.StatusCode.UNKNOWN,
            }
            assert "module" in words or "component" in words, words
            outcomes["started" if container else "created"] += 1
        else:
            lab.cri.stop(container, generator.choice((0, 1)))
            assert 0 <= lab.cri.wait_exit(container).exit_code <= 255
            outcomes["ran"] += 1
        if container:
            lab.cri.remove(container)
        lab.cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=reference)))
    assert lab.daemon.pid == pid
    assert outcomes["ran"] > 0 < outcomes["created"], outcomes
    assert lab.cri.wait_exit(lab.cri.run(pod, container_config(good, name="after"))).exit_code == 0
    eventually(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before + 4)
    assert guest_tasks(lab) == []
    # Of the images that are there: the good one and that of the lab.
    eventually(lambda: len(list(lab.daemon.root.glob("wasm/*/*.cwasm"))) <= 2)
