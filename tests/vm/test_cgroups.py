"""Pods on cgroup v2 with both cgroup drivers: where their processes are, what limits and ends them, what they use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.cgroup_plan import Driver, cgroup_dir, monitor_dir
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.support import leftovers
from tests.support import wasm as guests
from tests.support.cri import container_config
from tests.support.expect import eventually
from tests.support.images import Registry
from tests.support.scale import count
from tests.support.world import unchanged

pytestmark = [pytest.mark.root, pytest.mark.vm]

LINUX = pytest.mark.parametrize("handler", ["runc", "crun"])
MIB = 1 << 20
ROOT = Path("/sys/fs/cgroup")
SLEEP = "exec sleep 1000"
LIMITED = pb.LinuxContainerResources(
    cpu_quota=50_000,
    cpu_period=100_000,
    cpu_shares=512,
    cpuset_cpus="0",
    memory_limit_in_bytes=64 * MIB,
    memory_swap_limit_in_bytes=96 * MIB,
    hugepage_limits=[pb.HugepageLimit(page_size="2MB", limit=4 * MIB)],
    unified={"memory.high": str(60 * MIB), "pids.max": "77"},
)
HELD = {
    "cpu.max": "50000 100000",
    "cpuset.cpus": "0",
    "memory.max": str(64 * MIB),
    "memory.swap.max": str(32 * MIB),
    "memory.high": str(60 * MIB),
    "hugetlb.2MB.max": str(4 * MIB),
    "pids.max": "77",
}


def with_limits(config: pb.ContainerConfig, limits: pb.LinuxContainerResources) -> pb.ContainerConfig:
    config.linux.resources.CopyFrom(limits)
    return config


def seen(lab: Lab, container: str, file: str) -> str:
    """What the container reads in its own cgroup."""
    answer = lab.cri.exec(container, ["cat", f"/sys/fs/cgroup/{file}"], within=30)
    assert answer.exit_code == 0, answer.stderr
    return answer.stdout.decode().strip()


def info(lab: Lab, container: str) -> dict[str, object]:
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    found: dict[str, object] = json.loads(lab.cri.runtime.ContainerStatus(request).info["info"])
    return found


def cgroup_of(pid: object) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip()


def stats_of(lab: Lab, container: str) -> pb.ContainerStats:
    return lab.cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats


@LINUX
def test_processes_are_where_the_driver_says_and_leave_nothing(lab: Lab, driver: Driver, handler: str) -> None:
    daemon = lab.daemon
    # The first containers make what stays: the directory of the runtime and of its cache, the slice of the pods.
    lab.say(lab.pod(handler, pid=pb.POD), "true")
    lab.cri.remove_all_pods()
    with unchanged(daemon, within=20):
        pod = lab.pod(handler, pid=pb.POD)
        container = lab.cri.run(pod, lab.shell(SLEEP))
        found = info(lab, container)
        assert cgroup_of(found["pid"]) == f"0::/{cgroup_dir(daemon.cgroup_parent, container, driver)}"
        assert cgroup_of(found["monitorPid"]) == f"0::/{monitor_dir(daemon.cgroup_parent, container, driver)}"
        lab.cri.stop_pod(pod)
        lab.cri.remove_pod(pod)


@LINUX
def test_limits_as_the_container_sees_them(lab: Lab, handler: str) -> None:
    container = lab.cri.run(lab.pod(handler), with_limits(lab.shell(SLEEP), LIMITED))
    assert {file: seen(lab, container, file) for file in HELD} == HELD
    # Each runtime has its own curve from shares to weight; 100 is what 1024 shares are meant to be.
    assert 1 < int(seen(lab, container, "cpu.weight")) < 100


@LINUX
def test_the_container_sees_no_other_cgroup(lab: Lab, handler: str) -> None:
    script = (
        "cat /proc/self/cgroup; ls /sys/fs/cgroup/cgroup.procs; test -w /sys/fs/cgroup/cgroup.procs || echo read-only"
    )
    lines = lab.say(lab.pod(handler), f"{script}; mkdir /sys/fs/cgroup/x 2>/dev/null || echo refused")
    assert lines[0] == "0::/"
    assert lines[1] == "/sys/fs/cgroup/cgroup.procs"
    assert lines[-1] == "refused"


@LINUX
def test_update(lab: Lab, handler: str) -> None:
    pod = lab.pod(handler)
    created = lab.cri.create(pod, with_limits(lab.shell(SLEEP, name="created"), LIMITED))
    running = lab.cri.run(pod, with_limits(lab.shell(SLEEP, name="running"), LIMITED))
    change = pb.LinuxContainerResources(
        cpu_quota=20_000,
        memory_limit_in_bytes=80 * MIB,
        memory_swap_limit_in_bytes=80 * MIB,
        unified={"memory.high": "max"},
    )
    for container in (created, running):
        request = pb.UpdateContainerResourcesRequest(container_id=container, linux=change)
        lab.cri.runtime.UpdateContainerResources(request, timeout=60)
    lab.cri.start(created)
    wanted = HELD | {
        "cpu.max": "20000 100000",
        "memory.max": str(80 * MIB),
        "memory.swap.max": "0",
        "memory.high": "max",
    }
    for container in (created, running):
        assert {file: seen(lab, container, file) for file in wanted} == wanted
        told = lab.cri.status(container).resources.linux
        assert (told.cpu_quota, told.cpu_period, told.memory_limit_in_bytes) == (20_000, 100_000, 80 * MIB)
        assert dict(told.unified) == {"memory.high": "max", "pids.max": "77"}


@LINUX
def test_out_of_memory_is_never_missed(lab: Lab, handler: str) -> None:
    pod = lab.pod(handler)
    for number in range(count(100, 5)):
        config = lab.shell("exec tail /dev/zero", name=f"hungry-{number}")
        config.linux.resources.memory_limit_in_bytes = 24 * MIB
        container = lab.cri.run(pod, config)
        status = lab.cri.wait_exit(container, within=60)
        assert (status.exit_code, status.reason) == (137, "OOMKilled"), number
        lab.cri.remove(container)


@LINUX
def test_what_is_no_lack_of_memory(lab: Lab, handler: str) -> None:
    pod = lab.pod(handler)
    config = lab.shell("tail /dev/zero; exit 3", name="survivor")
    config.linux.resources.memory_limit_in_bytes = 24 * MIB
    survivor = lab.cri.wait_exit(lab.cri.run(pod, config), within=60)
    killed = lab.cri.run(pod, lab.shell(SLEEP, name="killed"))
    lab.cri.stop(killed)
    ends = [(status.exit_code, status.reason) for status in (survivor, lab.cri.wait_exit(killed))]
    assert ends == [(3, "Error"), (137, "Error")]


@LINUX
def test_stats(lab: Lab, handler: str) -> None:
    hold = "x=$(head -c 33554432 /dev/zero | tr '\\0' x); echo ready; while :; do sleep 1; done"
    limits = pb.LinuxContainerResources(
        memory_limit_in_bytes=160 * MIB,
        memory_swap_limit_in_bytes=192 * MIB,
        cpu_quota=50_000,
        cpu_period=100_000,
    )
    pod = lab.pod(handler)
    container = lab.cri.run(pod, with_limits(lab.shell(hold), limits))
    lab.cri.wait_log(container, "ready", within=60)
    # Written to swap on demand (memory.reclaim), which needs no shortage.
    place = ROOT / cgroup_of(info(lab, container)["pid"]).removeprefix("0::/")
    (place / "memory.reclaim").write_text(f"{8 * MIB} swappiness=200")
    stats = stats_of(lab, container)
    assert stats.memory.rss_bytes.value > 16 * MIB
    assert stats.memory.available_bytes.value == 160 * MIB - stats.memory.working_set_bytes.value
    assert stats.memory.page_faults.value > 0
    assert stats.swap.swap_usage_bytes.value > 4 * MIB
    assert stats.swap.swap_usage_bytes.value + stats.swap.swap_available_bytes.value == 32 * MIB
    assert stats.cpu.usage_core_nano_seconds.value > 0
    # It filled its memory with half a CPU: it waited.
    assert stats.cpu.psi.Some.Total > 0
    for pressure in (stats.cpu.psi, stats.memory.psi, stats.io.psi):
        assert pressure.HasField("Some")
        assert pressure.HasField("Full")


def test_a_pod_as_a_whole(lab: Lab, driver: Driver) -> None:
    pod = lab.pod("runc", pid=pb.POD)
    config = lab.shell("while :; do :; done")
    config.linux.security_context.namespace_options.pid = pb.POD
    container = lab.cri.run(pod, config)

    def stats() -> pb.LinuxPodSandboxStats:
        return lab.cri.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod.id)).stats.linux

    eventually(lambda: stats().cpu.usage_core_nano_seconds.value > 200_000_000, within=60)
    found = stats()
    assert [each.attributes.id for each in found.containers] == [container]
    assert found.cpu.usage_core_nano_seconds.value >= found.containers[0].cpu.usage_core_nano_seconds.value
    assert found.memory.usage_bytes.value > found.containers[0].memory.usage_bytes.value
    assert found.process.process_count.value == 2
    assert found.cpu.psi.HasField("Some")


def test_the_daemons_own_cgroup_is_left_as_it_was(make_daemon: MakeDaemon, registry: Registry, run_name: str) -> None:
    def shape() -> tuple[str, str, set[str]]:
        words = [(own / f"cgroup.{name}").read_text().strip() for name in ("type", "subtree_control")]
        return words[0], words[1], {each.name for each in own.iterdir() if each.is_dir()}

    daemon = make_daemon()
    own = ROOT / f"{leftovers.CGROUP_PREFIX}{run_name}_own"
    own.mkdir()
    (own / "cgroup.procs").write_text(str(daemon.pid))
    assert shape() == ("domain", "", set())
    image = registry.push_wasm("test/vm-sleep:1", guests.SLEEP)
    with daemon.client() as cri:
        cri.pull(image)
        container = cri.run(cri.run_pod(daemon.pod_config(network=pb.NODE), "wasm"), container_config(image))
        cri.wait_log(container, "going to sleep", within=60)
        # Its thread, not the daemon, is below.
        eventually(lambda: shape() == ("domain threaded", "cpu", {"cri-shim-threads"}), within=30)
        cri.remove_all_pods()
    assert daemon.stop() == 0
    assert shape() == ("domain", "", set())
    own.rmdir()


def test_a_module_is_in_no_cgroup_of_its_pod(lab: Lab, registry: Registry) -> None:
    image = registry.push_wasm("test/vm-sleep:1", guests.GROWN)
    lab.cri.pull(image)
    pod = lab.pod("wasm")
    container = lab.cri.run(pod, container_config(image))
    sidecar = lab.cri.run(pod, lab.shell(SLEEP, name="sidecar"))
    lab.cri.wait_log(container, "going to sleep", within=30)
    below = ROOT / lab.daemon.cgroup_parent.strip("/")
    pids = {pid for file in below.rglob("cgroup.procs") for pid in file.read_text().split()}
    assert str(info(lab, sidecar)["pid"]) in pids
    assert str(lab.daemon.pid) not in pids
    assert stats_of(lab, container).memory.usage_bytes.value > 0
