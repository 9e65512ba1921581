"""Wasm workers on cgroup v2 with both cgroup drivers: where they are, what limits and ends them, what they leave."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.cgroup_plan import Driver, cgroup_dir
from tests.e2e.conftest import Lab
from tests.support import wasm as guests
from tests.support.cri import Pod, container_config, whole_lines
from tests.support.expect import eventually, refused
from tests.support.images import Registry
from tests.support.scale import count
from tests.support.world import unchanged

pytestmark = [pytest.mark.root, pytest.mark.vm]

MIB = 1 << 20
ROOT = Path("/sys/fs/cgroup")
LIMITED = pb.LinuxContainerResources(
    cpu_quota=50_000,
    cpu_period=100_000,
    cpu_shares=512,
    cpuset_cpus="0",
    memory_limit_in_bytes=64 * MIB,
    memory_swap_limit_in_bytes=96 * MIB,
    unified={"memory.high": str(60 * MIB), "pids.max": "77"},
)
HELD = {
    "cpu.max": "50000 100000",
    "cpuset.cpus": "0",
    "memory.max": str(64 * MIB),
    "memory.swap.max": str(32 * MIB),
    "memory.high": str(60 * MIB),
    "pids.max": "77",
}


def worker_pod(lab: Lab) -> Pod:
    config = lab.pod_config()
    config.annotations["cri-shim.io/isolation"] = "process"
    return lab.pod("wasm", config=config)


def image(lab: Lab, registry: Registry, name: str, module: str) -> str:
    reference = registry.push_wasm(f"test/vm-{name}:1", module)
    lab.cri.pull(reference)
    return reference


def pid_of(lab: Lab, container: str) -> int:
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    return int(json.loads(lab.cri.runtime.ContainerStatus(request).info["info"])["pid"])


def place_of(lab: Lab, container: str, driver: Driver) -> Path:
    return ROOT / cgroup_dir(lab.daemon.cgroup_parent, container, driver)


def read(place: Path, files: dict[str, str]) -> dict[str, str]:
    return {file: (place / file).read_text().strip() for file in files}


def test_a_worker_is_where_the_driver_says_with_its_limits_and_leaves_nothing(
    lab: Lab, driver: Driver, registry: Registry
) -> None:
    reference = image(lab, registry, "sleep", guests.SLEEP)
    lab.cri.run(worker_pod(lab), container_config(reference))  # makes what stays: zygote, compiled module, slice
    lab.cri.remove_all_pods()
    with unchanged(lab.daemon, within=20):
        pod = worker_pod(lab)
        config = container_config(reference)
        config.linux.resources.CopyFrom(LIMITED)
        container = lab.cri.run(pod, config)
        lab.cri.wait_log(container, "going to sleep", within=60)
        place = place_of(lab, container, driver)
        assert Path(f"/proc/{pid_of(lab, container)}/cgroup").read_text() == f"0::/{place.relative_to(ROOT)}\n"
        assert read(place, HELD) == HELD
        assert 1 < int((place / "cpu.weight").read_text()) < 100
        # systemd writes what it knows once more when it is told to look at its units again.
        if driver is Driver.SYSTEMD:
            assert os.system("systemctl daemon-reload") == 0
        assert read(place, HELD) == HELD
        change = pb.LinuxContainerResources(
            cpu_quota=20_000, memory_limit_in_bytes=80 * MIB, memory_swap_limit_in_bytes=80 * MIB
        )
        lab.cri.runtime.UpdateContainerResources(
            pb.UpdateContainerResourcesRequest(container_id=container, linux=change), timeout=60
        )
        wanted = {"cpu.max": "20000 100000", "memory.max": str(80 * MIB), "memory.swap.max": "0"}
        assert read(place, wanted) == wanted
        if driver is Driver.SYSTEMD:
            assert os.system("systemctl daemon-reload") == 0
            assert read(place, wanted) == wanted
        stats = lab.cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats
        assert stats.cpu.usage_core_nano_seconds.value > 0
        assert 0 < stats.memory.working_set_bytes.value < 80 * MIB
        lab.cri.stop(container, 10)
        assert lab.cri.status(container).exit_code == 143
        lab.cri.remove(container)
        assert not place.exists()
        lab.cri.stop_pod(pod)
        lab.cri.remove_pod(pod)


def test_less_memory_than_it_uses_is_refused(lab: Lab, registry: Registry) -> None:
    container = lab.cri.run(worker_pod(lab), container_config(image(lab, registry, "sleep", guests.SLEEP)))
    lab.cri.wait_log(container, "going to sleep", within=60)
    change = pb.LinuxContainerResources(memory_limit_in_bytes=512 * 1024)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "bytes in use"):
        lab.cri.runtime.UpdateContainerResources(
            pb.UpdateContainerResourcesRequest(container_id=container, linux=change), timeout=60
        )
    assert lab.cri.status(container).state == pb.CONTAINER_RUNNING


def test_out_of_memory_is_never_missed_and_ends_no_other(lab: Lab, registry: Registry) -> None:
    pod = worker_pod(lab)
    bystander = lab.cri.run(pod, container_config(image(lab, registry, "sleep", guests.SLEEP), name="bystander"))
    hungry = image(lab, registry, "hog", guests.TOUCHING_HOG)
    for number in range(count(20, 3)):
        config = container_config(hungry, name=f"hungry-{number}")
        config.linux.resources.memory_limit_in_bytes = 24 * MIB
        container = lab.cri.run(pod, config)
        status = lab.cri.wait_exit(container, within=60)
        assert (status.exit_code, status.reason) == (137, "OOMKilled"), number
        lab.cri.remove(container)
    killed = lab.cri.run(pod, container_config(image(lab, registry, "sleep", guests.SLEEP), name="killed"))
    os.kill(pid_of(lab, killed), signal.SIGKILL)
    status = lab.cri.wait_exit(killed, within=60)
    assert (status.exit_code, status.reason) == (137, "Error")
    assert lab.cri.status(bystander).state == pb.CONTAINER_RUNNING


def test_it_outlives_the_daemon(lab: Lab, registry: Registry, driver: Driver) -> None:
    container = lab.cri.run(worker_pod(lab), container_config(image(lab, registry, "sleep", guests.SLEEP)))
    pid = pid_of(lab, container)
    lab.daemon.kill()
    lab.daemon.start()
    with lab.daemon.client() as cri:
        assert cri.status(container).state == pb.CONTAINER_RUNNING
        assert pid in map(int, (place_of(lab, container, driver) / "cgroup.procs").read_text().split())
        cri.stop(container, 10)
        assert cri.status(container).exit_code == 143


@pytest.mark.parametrize("isolation", ["process", "in-process"])
def test_exec_is_in_the_containers_cgroup(lab: Lab, registry: Registry, driver: Driver, isolation: str) -> None:
    reference = image(lab, registry, "sleep", guests.SLEEP)
    config = lab.pod_config()
    if isolation == "process":
        config.annotations["cri-shim.io/isolation"] = isolation
    container = lab.cri.run(lab.pod("wasm", config=config), container_config(reference))
    lab.cri.wait_log(container, "going to sleep", within=60)
    place = place_of(lab, container, driver)

    def there() -> set[str]:
        return set((place / "cgroup.procs").read_text().split()) if place.exists() else set()

    before = there()
    for _ in range(2):
        request = pb.ExecSyncRequest(container_id=container, cmd=["x.wasm"], timeout=60)
        running = lab.cri.runtime.ExecSync.future(request, timeout=60)
        eventually(lambda: len(there() - before) == 1, within=30)
        running.cancel()
        eventually(lambda: there() == before, within=30)
    assert whole_lines(lab.cri.log(container)) == ["going to sleep"]
