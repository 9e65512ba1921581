"""UpdateContainerResources, UpdatePodSandboxResources: what the kernel holds before and after, and what status says."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.support import wasm as guests
from tests.support.cri import Pod, container_config
from tests.support.expect import eventually, refused
from tests.support.images import Registry

pytestmark = pytest.mark.root
linux = pytest.mark.parametrize("handler", ["runc", "crun"])

MIB = 1 << 20
INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
_CPUS = Path("/sys/fs/cgroup/cpuset/cpuset.cpus")

v1 = pytest.mark.skipif(not _CPUS.exists(), reason="reads files of cgroup v1; scripts/test-vm has v2")

# The files of cgroup v1 that hold a limit, by the field of the request.
FILES = {
    "cpu_shares": "cpu/{}/cpu.shares",
    "cpu_quota": "cpu/{}/cpu.cfs_quota_us",
    "cpu_period": "cpu/{}/cpu.cfs_period_us",
    "memory_limit_in_bytes": "memory/{}/memory.limit_in_bytes",
    "memory_swap_limit_in_bytes": "memory/{}/memory.memsw.limit_in_bytes",
    "cpuset_cpus": "cpuset/{}/cpuset.cpus",
    "cpuset_mems": "cpuset/{}/cpuset.mems",
}


def limits(lab: Lab, container: str) -> dict[str, str]:
    """What the kernel holds."""
    place = f"{lab.daemon.cgroup_parent.strip('/')}/{container}"
    return {field: Path("/sys/fs/cgroup", file.format(place)).read_text().strip() for field, file in FILES.items()}


def update(lab: Lab, container: str, **fields: object) -> None:
    asked = pb.LinuxContainerResources(**fields)  # type: ignore[arg-type]
    lab.cri.runtime.UpdateContainerResources(
        pb.UpdateContainerResourcesRequest(container_id=container, linux=asked), timeout=60
    )


def told(lab: Lab, container: str) -> pb.LinuxContainerResources:
    return lab.cri.status(container).resources.linux


def sleeper(lab: Lab, **fields: object) -> pb.ContainerConfig:
    config = lab.shell("while :; do sleep 0.05; cat /proc/self/oom_score_adj; done")
    config.linux.resources.MergeFrom(pb.LinuxContainerResources(**fields))  # type: ignore[arg-type]
    return config


def first(lab: Lab) -> pb.LinuxContainerResources:
    return pb.LinuxContainerResources(
        cpu_shares=512, cpu_quota=50_000, cpu_period=100_000, memory_limit_in_bytes=64 * MIB
    )


@v1
@linux
def test_a_running_container(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.run(lab.pod(handler), sleeper(lab, cpu_shares=512, memory_limit_in_bytes=64 * MIB))
    before = limits(lab, container)
    assert (before["cpu_shares"], before["memory_limit_in_bytes"]) == ("512", str(64 * MIB))
    update(lab, container, memory_limit_in_bytes=96 * MIB)
    more = {"memory_limit_in_bytes": str(96 * MIB), "memory_swap_limit_in_bytes": str(96 * MIB)}
    assert limits(lab, container) == before | more
    # Down again, with the rest: what is not named stays.
    update(lab, container, memory_limit_in_bytes=48 * MIB, cpu_quota=20_000, cpu_period=50_000, cpuset_cpus="0")
    after = limits(lab, container)
    assert after == before | {
        "memory_limit_in_bytes": str(48 * MIB),
        "memory_swap_limit_in_bytes": str(48 * MIB),
        "cpu_quota": "20000",
        "cpu_period": "50000",
        "cpuset_cpus": "0",
    }
    assert told(lab, container) == pb.LinuxContainerResources(
        cpu_shares=512, cpu_quota=20_000, cpu_period=50_000, memory_limit_in_bytes=48 * MIB, cpuset_cpus="0"
    )
    assert lab.cri.exec(container, ["cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]).stdout == b"%d\n" % (
        48 * MIB
    )
    update(lab, container)
    assert limits(lab, container) == after


@v1
@linux
def test_swap(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.run(lab.pod(handler), sleeper(lab, memory_limit_in_bytes=64 * MIB))
    update(lab, container, memory_swap_limit_in_bytes=80 * MIB)
    assert limits(lab, container)["memory_swap_limit_in_bytes"] == str(80 * MIB)
    # It includes the memory, so that one alone cannot pass the other.
    with refused(INVALID, "memory_swap_limit_in_bytes"):
        update(lab, container, memory_limit_in_bytes=96 * MIB)
    update(lab, container, memory_limit_in_bytes=96 * MIB, memory_swap_limit_in_bytes=96 * MIB)
    held = limits(lab, container)
    assert held["memory_limit_in_bytes"] == held["memory_swap_limit_in_bytes"] == str(96 * MIB)


@v1
@linux
def test_no_quota_any_more(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.run(lab.pod(handler), sleeper(lab, cpu_quota=50_000, cpu_period=100_000))
    update(lab, container, cpu_quota=-1)
    assert (limits(lab, container)["cpu_quota"], told(lab, container).cpu_quota) == ("-1", -1)
    update(lab, container, cpu_shares=700)
    held = limits(lab, container)
    assert (held["cpu_quota"], held["cpu_shares"]) == ("-1", "700")
    update(lab, container, cpu_quota=30_000)
    assert limits(lab, container)["cpu_quota"] == "30000"
    never = sleeper(lab, cpu_quota=-1)
    never.metadata.name = "never"
    assert limits(lab, lab.cri.run(lab.pod(handler), never))["cpu_quota"] == "-1"


@v1
@linux
def test_a_created_container_starts_with_the_new_limits(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.create(lab.pod(handler), sleeper(lab, memory_limit_in_bytes=64 * MIB, oom_score_adj=100))
    update(lab, container, memory_limit_in_bytes=32 * MIB, cpu_shares=256, oom_score_adj=300)
    lab.cri.start(container)
    held = limits(lab, container)
    assert (held["memory_limit_in_bytes"], held["cpu_shares"]) == (str(32 * MIB), "256")
    assert {line.text for line in lab.cri.wait_log(container, "300")} == {"300"}


@linux
def test_the_score_of_every_process(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.run(lab.pod(handler), sleeper(lab, oom_score_adj=100))
    lab.cri.wait_log(container, "100")
    update(lab, container, oom_score_adj=500)
    lab.cri.wait_log(container, "500")
    scores = "cd /proc; until grep -q 500 $$/oom_score_adj; do sleep 0.05; done; cat 1/oom_score_adj self/oom_score_adj"
    assert lab.cri.exec(container, ["sh", "-c", scores]).stdout == b"500\n500\n"
    update(lab, container, oom_score_adj=200)
    lab.cri.wait_log(container, "200")
    assert told(lab, container).oom_score_adj == 200


@v1
@linux
def test_a_failure_restores_what_was(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    absent = str(int(_CPUS.read_text().strip().replace("-", ",").split(",")[-1]) + 1)
    bare = sleeper(lab)
    bare.metadata.name = "bare"
    pod = lab.pod(handler)
    for container in (lab.cri.run(pod, sleeper(lab, **_as_fields(first(lab)))), lab.cri.run(pod, bare)):
        before, said = limits(lab, container), told(lab, container)
        for code, word, fields in (
            (PRECONDITION, "cpuset_cpus", {"cpuset_cpus": absent, "cpu_shares": 300, "cpu_quota": 10_000}),
            (PRECONDITION, "cpuset_mems", {"cpuset_mems": "63", "memory_limit_in_bytes": 80 * MIB}),
            (PRECONDITION, "memory_limit_in_bytes", {"memory_limit_in_bytes": 100_000, "cpu_shares": 300}),
            (INVALID, "cpu_shares", {"cpu_shares": 1, "memory_limit_in_bytes": 80 * MIB}),
            (PRECONDITION, "unified", {"unified": {"memory.high": "1000000"}, "cpu_shares": 300}),
        ):
            with refused(code, word):
                update(lab, container, **fields)
            assert limits(lab, container) == before, fields
            assert told(lab, container) == said


@v1
@linux
def test_less_memory_than_is_used(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    config = lab.shell("head -c 60000000 /dev/zero | tail | sleep 600")
    config.linux.resources.memory_limit_in_bytes = 128 * MIB
    container = lab.cri.run(lab.pod(handler), config)
    used = Path("/sys/fs/cgroup/memory", lab.daemon.cgroup_parent.strip("/"), container, "memory.usage_in_bytes")
    eventually(lambda: int(used.read_text()) > 60_000_000)
    before = limits(lab, container)
    with refused(PRECONDITION, "memory_limit_in_bytes"):
        update(lab, container, memory_limit_in_bytes=16 * MIB, cpu_shares=300)
    assert limits(lab, container) == before
    assert told(lab, container).memory_limit_in_bytes == 128 * MIB
    assert lab.cri.status(container).state == pb.CONTAINER_RUNNING


@linux
def test_an_ended_container_keeps_what_is_said(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.run(lab.pod(handler), lab.shell("true"))
    lab.cri.wait_exit(container)
    update(lab, container, memory_limit_in_bytes=64 * MIB)
    assert told(lab, container) == pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
    lab.cri.remove(container)
    with refused(grpc.StatusCode.NOT_FOUND, container[:13]):
        update(lab, container, memory_limit_in_bytes=64 * MIB)


@v1
@linux
def test_a_later_daemon_knows_it(lab: Lab, handler: str) -> None:
    pod = lab.pod(handler)
    container = lab.cri.run(pod, sleeper(lab, memory_limit_in_bytes=64 * MIB))
    update(lab, container, memory_limit_in_bytes=96 * MIB, oom_score_adj=400)
    lab.daemon.restart()
    with lab.daemon.client() as cri:
        again = Lab(lab.daemon, cri, lab.busybox, lab.wasm)
        assert told(again, container).memory_limit_in_bytes == 96 * MIB
        update(again, container, cpu_shares=333)
        held = limits(again, container)
        assert (held["memory_limit_in_bytes"], held["cpu_shares"]) == (str(96 * MIB), "333")
        expected = pb.LinuxContainerResources(memory_limit_in_bytes=96 * MIB, oom_score_adj=400, cpu_shares=333)
        assert told(again, container) == expected


@linux
def test_the_least_memory_is_configuration(make_daemon: MakeDaemon, busybox: str, handler: str) -> None:
    daemon = make_daemon({"handlers": {handler: {"kind": "oci", "path": handler, "min_memory": 20 * MIB}}})
    with daemon.client() as cri:
        cri.pull(busybox)
        lab = Lab(daemon, cri, busybox, "")
        pod = lab.pod(handler)
        with refused(PRECONDITION, f"memory_limit_in_bytes {20 * MIB - 1} is less than the {20 * MIB}"):
            cri.create(pod, sleeper(lab, memory_limit_in_bytes=20 * MIB - 1))
        container = cri.run(pod, sleeper(lab, memory_limit_in_bytes=20 * MIB))
        with refused(PRECONDITION, f"less than the {20 * MIB}"):
            update(lab, container, memory_limit_in_bytes=20 * MIB - 1)
        assert told(lab, container).memory_limit_in_bytes == 20 * MIB


def test_the_least_memory_of_the_built_in_handlers(shared_lab: Lab) -> None:
    lab = shared_lab
    config = sleeper(lab, memory_limit_in_bytes=8 * MIB)
    with refused(PRECONDITION, f"less than the {12 * MIB}"):
        lab.cri.create(lab.pod("runc"), config)
    lab.cri.run(lab.pod("crun"), config)
    config.linux.resources.memory_limit_in_bytes = 500_000
    with refused(PRECONDITION, "less than the 512000"):
        lab.cri.create(lab.pod("crun"), config)


def _as_fields(message: pb.LinuxContainerResources) -> dict[str, object]:
    return {field.name: value for field, value in message.ListFields()}


def _thread(container: str) -> Path:
    """The thread of a Wasm container that runs in some daemon of this machine."""
    for comm in Path("/proc").glob("[0-9]*/task/[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text().strip() == f"wasm-{container[:10]}":
                return comm.parent
    raise AssertionError("the guest has no thread")


def _wasm_pod(lab: Lab, registry: Registry) -> tuple[Pod, str]:
    reference = registry.push_wasm("update/sleep:1", guests.SLEEP)
    lab.cri.pull(reference)
    return lab.pod("wasm"), reference


def test_a_running_module(shared_lab: Lab, registry: Registry) -> None:
    lab = shared_lab
    pod, reference = _wasm_pod(lab, registry)
    config = container_config(reference)
    config.linux.resources.MergeFrom(pb.LinuxContainerResources(cpu_shares=100, memory_limit_in_bytes=10 * MIB))
    container = lab.cri.run(pod, config)
    lab.cri.wait_log(container, "going to sleep")  # it has its memory
    thread = int(_thread(container).name)
    before = os.getpriority(os.PRIO_PROCESS, thread)
    update(lab, container, cpu_shares=20, cpuset_cpus="0", cpu_quota=5000, cpu_period=50000)
    assert os.getpriority(os.PRIO_PROCESS, thread) > before
    assert os.sched_getaffinity(thread) == {0}
    with refused(PRECONDITION, "memory_limit_in_bytes"):
        update(lab, container, memory_limit_in_bytes=1000, cpuset_cpus="1")
    assert os.sched_getaffinity(thread) == {0}
    update(lab, container, memory_limit_in_bytes=20 * MIB)
    assert told(lab, container) == pb.LinuxContainerResources(
        cpu_shares=20, cpuset_cpus="0", cpu_quota=5000, cpu_period=50000, memory_limit_in_bytes=20 * MIB
    )
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    assert '"quota": 5000' in lab.cri.runtime.ContainerStatus(request).info["info"]


def test_a_created_module(lab: Lab, registry: Registry) -> None:
    pod, reference = _wasm_pod(lab, registry)
    container = lab.cri.create(pod, container_config(reference))
    update(lab, container, memory_limit_in_bytes=10 * MIB, cpuset_cpus="0")
    lab.daemon.restart()
    with lab.daemon.client() as cri:
        cri.start(container)
        assert cri.status(container).resources.linux.memory_limit_in_bytes == 10 * MIB
        assert os.sched_getaffinity(int(_thread(container).name)) == {0}
        request = pb.ContainerStatusRequest(container_id=container, verbose=True)
        assert f'"memoryLimit": {10 * MIB}' in cri.runtime.ContainerStatus(request).info["info"]


def test_a_pod_as_the_kubelet_has_sized_it(shared_lab: Lab, registry: Registry) -> None:
    lab = shared_lab
    pod, reference = _wasm_pod(lab, registry)
    before = lab.cri.pod_status(pod)

    def resize(pod_id: str, **fields: pb.LinuxContainerResources) -> None:
        request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod_id, **fields)
        lab.cri.runtime.UpdatePodSandboxResources(request, timeout=10)

    resize(pod.id, resources=pb.LinuxContainerResources(memory_limit_in_bytes=12 * MIB))
    resize(pod.id, overhead=pb.LinuxContainerResources(cpu_shares=10))
    assert lab.cri.pod_status(pod) == before
    # A module is not in the pod's cgroup: the limit of the pod holds for it by ourselves.
    container = lab.cri.run(pod, container_config(reference))
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    assert f'"memoryLimit": {12 * MIB}' in lab.cri.runtime.ContainerStatus(request).info["info"]
    with refused(INVALID, "cpu_shares"):
        resize(pod.id, resources=pb.LinuxContainerResources(cpu_shares=1))
    with refused(grpc.StatusCode.NOT_FOUND, "f" * 64):
        resize("f" * 64)
