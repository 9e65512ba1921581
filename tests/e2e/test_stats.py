"""What containers and pods use, as clients read it: each figure against something that the container really did."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.e2e.test_network import addresses_of, fetch, serve
from tests.support import images, leftovers
from tests.support import wasm as guests
from tests.support.cri import Pod, container_config
from tests.support.expect import eventually, refused

pytestmark = pytest.mark.root

LINUX = pytest.mark.parametrize("handler", ["runc", "crun"])
MIB = 1 << 20
SPIN = "while :; do :; done"
SLEEP = "exec sleep 1000"
ROUND = 25
"""Seconds within which every container was measured in the background."""


def stats_of(lab: Lab, container: str) -> pb.ContainerStats:
    return lab.cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats


def listed(lab: Lab, **wanted: object) -> dict[str, pb.ContainerStats]:
    request = pb.ListContainerStatsRequest(filter=pb.ContainerStatsFilter(**wanted))  # type: ignore[arg-type]
    return {stats.attributes.id: stats for stats in lab.cri.runtime.ListContainerStats(request).stats}


def pod_stats_of(lab: Lab, pod: Pod) -> pb.LinuxPodSandboxStats:
    return lab.cri.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod.id)).stats.linux


def pods_listed(lab: Lab, **wanted: object) -> set[str]:
    request = pb.ListPodSandboxStatsRequest(filter=pb.PodSandboxStatsFilter(**wanted))  # type: ignore[arg-type]
    return {stats.attributes.id for stats in lab.cri.runtime.ListPodSandboxStats(request).stats}


def limited(config: pb.ContainerConfig, memory: int, swap: int = 0) -> pb.ContainerConfig:
    config.linux.resources.memory_limit_in_bytes = memory
    config.linux.resources.memory_swap_limit_in_bytes = swap
    return config


def wasm(lab: Lab, registry: images.Registry, name: str, text: str) -> pb.ContainerConfig:
    image = registry.push_wasm(f"test/stats-{name}:1", text)
    lab.cri.pull(image)
    return container_config(image, name=name)


def is_busy(read: Callable[[], pb.CpuUsage]) -> None:
    """Holds the CPU figures of something that computes without a pause to be true."""
    before = read()
    time.sleep(1.2)
    after = read()
    elapsed = after.timestamp - before.timestamp
    used = after.usage_core_nano_seconds.value - before.usage_core_nano_seconds.value
    # A busy machine gives it less than a CPU, but never nothing.
    assert 0.001 * elapsed < used < (os.cpu_count() or 1) * elapsed * 1.05
    assert after.usage_nano_cores.value == pytest.approx(used / elapsed * 1e9, rel=0.05)


@pytest.fixture
def own_parent(shared_lab: Lab) -> Iterator[str]:
    """A cgroup of one pod's own, as the kubelet makes it."""
    parent = f"{shared_lab.daemon.cgroup_parent}/pod-{time.monotonic_ns()}"
    yield parent
    shared_lab.cri.remove_all_pods()
    leftovers.remove_cgroup(parent)


@LINUX
def test_cpu_of_a_linux_container(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    pod = lab.pod(handler)
    busy = lab.cri.run(pod, lab.shell(SPIN))
    assert not stats_of(lab, busy).cpu.HasField("usage_nano_cores")
    is_busy(lambda: stats_of(lab, busy).cpu)
    idle = lab.cri.run(pod, lab.shell(SLEEP, name="idle"))
    before = listed(lab)[idle].cpu
    time.sleep(1.1)
    after = listed(lab)[idle].cpu
    assert after.usage_core_nano_seconds.value - before.usage_core_nano_seconds.value < 200_000_000
    assert after.usage_nano_cores.value < 200_000_000


def test_cpu_of_a_module_and_of_its_pod(shared_lab: Lab, registry: images.Registry) -> None:
    lab = shared_lab
    pod = lab.pod("wasm")
    busy = lab.cri.run(pod, wasm(lab, registry, "spin", guests.SPIN))
    is_busy(lambda: stats_of(lab, busy).cpu)
    is_busy(lambda: pod_stats_of(lab, pod).cpu)
    last = pod_stats_of(lab, pod).cpu.usage_core_nano_seconds.value
    lab.cri.stop(busy)
    # A sum that went down would look like a negative rate.
    assert pod_stats_of(lab, pod).cpu.usage_core_nano_seconds.value >= last
    assert not stats_of(lab, busy).HasField("cpu")


@LINUX
def test_memory_and_swap_of_a_linux_container(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    pod = lab.pod(handler)
    hold = f"x=$(head -c {32 * MIB} /dev/zero | tr '\\0' x); echo ready; while :; do sleep 1; done"
    small = lab.cri.run(pod, lab.shell(SLEEP, name="small"))
    large = lab.cri.run(pod, limited(lab.shell(hold), 256 * MIB, 320 * MIB))
    lab.cri.wait_log(large, "ready")
    found = listed(lab)
    memory = found[large].memory
    assert memory.rss_bytes.value > 32 * MIB
    assert memory.working_set_bytes.value > 32 * MIB
    assert memory.usage_bytes.value >= memory.working_set_bytes.value
    assert memory.available_bytes.value == 256 * MIB - memory.working_set_bytes.value
    assert memory.page_faults.value > 32 * MIB // 4096
    assert memory.HasField("major_page_faults")
    assert found[small].memory.rss_bytes.value < 8 * MIB
    assert found[small].memory.available_bytes.value == 0
    swap = found[large].swap
    assert swap.swap_available_bytes.value + swap.swap_usage_bytes.value == 64 * MIB
    assert not found[small].swap.HasField("swap_available_bytes")
    assert {each.timestamp > 0 for each in (memory, swap, found[small].swap)} == {True}


@LINUX
def test_file_cache_is_used_but_is_not_in_the_working_set(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    script = f"dd if=/dev/zero of=/file bs=1048576 count=48 && echo ready; {SLEEP}"
    container = lab.cri.run(lab.pod(handler), lab.shell(script))
    lab.cri.wait_log(container, "ready")
    memory = stats_of(lab, container).memory
    assert memory.usage_bytes.value > 48 * MIB
    assert memory.working_set_bytes.value < 24 * MIB


def test_memory_of_a_module(shared_lab: Lab, registry: images.Registry) -> None:
    lab = shared_lab
    pod = lab.pod("wasm")
    container = lab.cri.run(pod, limited(wasm(lab, registry, "grown", guests.GROWN), 64 * MIB))
    lab.cri.wait_log(container, "going to sleep")
    memory = stats_of(lab, container).memory
    assert 16 * MIB < memory.usage_bytes.value < 17 * MIB
    assert 8 * MIB <= memory.rss_bytes.value < 9 * MIB, "only what was written to is resident"
    assert memory.working_set_bytes == memory.rss_bytes
    assert memory.available_bytes.value == 64 * MIB - memory.working_set_bytes.value
    assert not memory.HasField("page_faults")
    assert pod_stats_of(lab, pod).memory.working_set_bytes.value >= memory.working_set_bytes.value
    lab.cri.stop(container)
    assert not stats_of(lab, container).HasField("memory")


@LINUX
def test_writable_layer(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.run(lab.pod(handler), lab.shell(SLEEP))
    eventually(lambda: stats_of(lab, container).HasField("writable_layer"))
    before = stats_of(lab, container).writable_layer
    assert before.used_bytes.value < MIB
    where = lab.cri.images.ImageFsInfo(pb.ImageFsInfoRequest()).image_filesystems[0].fs_id
    assert before.fs_id == where
    script = "mkdir /d && touch /d/1 /d/2 && dd if=/dev/zero of=/d/3 bs=1048576 count=8 && rm /bin/vi"
    assert lab.cri.exec(container, ["sh", "-c", script]).exit_code == 0

    def grown() -> bool:
        return stats_of(lab, container).writable_layer.used_bytes.value >= 8 * MIB

    eventually(grown, within=ROUND)
    after = stats_of(lab, container).writable_layer
    assert after.inodes_used.value >= before.inodes_used.value + 5
    assert after.timestamp > before.timestamp


def test_traffic_of_a_pod(shared_lab: Lab) -> None:
    lab = shared_lab
    pod = lab.pod("crun", network=pb.POD)
    container = serve(lab, pod, "x" * 100_000)
    (address,) = addresses_of(lab, pod)
    before = pod_stats_of(lab, pod).network
    assert before.default_interface.name == "eth0"
    assert not before.interfaces
    assert fetch(address) == "x" * 100_000
    after = pod_stats_of(lab, pod).network
    sent = after.default_interface.tx_bytes.value - before.default_interface.tx_bytes.value
    assert 100_000 < sent < 200_000
    assert after.default_interface.rx_bytes.value > before.default_interface.rx_bytes.value
    assert after.default_interface.tx_errors.value == after.default_interface.rx_errors.value == 0
    assert after.timestamp > before.timestamp
    # What is said on the pod's loopback is nobody's traffic.
    assert lab.cri.exec(container, ["sh", "-c", "echo | nc -w 1 127.0.0.1 80"]).exit_code == 0
    assert (
        pod_stats_of(lab, pod).network.default_interface.tx_bytes.value < after.default_interface.tx_bytes.value + 5000
    )
    assert not pod_stats_of(lab, lab.pod("crun")).HasField("network")


@LINUX
def test_a_pod_as_a_whole(shared_lab: Lab, own_parent: str, handler: str, registry: images.Registry) -> None:
    lab = shared_lab
    config = lab.pod_config(pid=pb.POD)
    config.linux.cgroup_parent = own_parent
    pod = lab.pod(handler, config=config)
    one = lab.shell(f"{SPIN} & {SLEEP}", name="one")
    two = lab.shell(SLEEP, name="two")
    for each in (one, two):
        each.linux.security_context.namespace_options.pid = pb.POD
    ids = {lab.cri.run(pod, one), lab.cri.run(pod, two)}
    lab.cri.run(lab.pod(handler), lab.shell(SPIN, name="stranger"))
    is_busy(lambda: pod_stats_of(lab, pod).cpu)
    stats = pod_stats_of(lab, pod)
    assert {each.attributes.id for each in stats.containers} == ids
    # sh's child and both sleeps, and the process that holds the shared PID namespace.
    assert stats.process.process_count.value == 4
    parts = sum(each.cpu.usage_core_nano_seconds.value for each in stats.containers)
    assert parts <= stats.cpu.usage_core_nano_seconds.value < 2 * parts + 1_000_000_000
    assert stats.memory.working_set_bytes.value >= max(each.memory.rss_bytes.value for each in stats.containers)
    # A module in the same pod is in none of its cgroups, and counts all the same.
    if handler == "crun":
        alone = stats.memory.usage_bytes.value
        grown = lab.cri.run(pod, wasm(lab, registry, "grown", guests.GROWN))
        lab.cri.wait_log(grown, "going to sleep")
        assert pod_stats_of(lab, pod).memory.usage_bytes.value > alone + 12 * MIB


def test_filters(shared_lab: Lab) -> None:
    lab = shared_lab
    one, two = lab.pod("crun"), lab.pod("crun")
    configs = {name: lab.shell(SLEEP, name=name) for name in ("a", "b", "c")}
    for name, config in configs.items():
        config.labels["letter"] = name
        config.annotations["about"] = name
    a, b = lab.cri.run(one, configs["a"]), lab.cri.run(one, configs["b"])
    c = lab.cri.run(two, configs["c"])
    assert set(listed(lab)) == {a, b, c}
    assert set(listed(lab, id=a[:20])) == {a}
    assert set(listed(lab, pod_sandbox_id=one.id)) == {a, b}
    assert set(listed(lab, pod_sandbox_id=one.id, label_selector={"letter": "b"})) == {b}
    assert not listed(lab, pod_sandbox_id=two.id, label_selector={"letter": "b"})
    assert not listed(lab, id=a, pod_sandbox_id=two.id)
    assert not listed(lab, label_selector={"letter": "a", "other": "x"})
    attributes = listed(lab, id=a)[a].attributes
    assert attributes.metadata.name == "a"
    assert attributes.labels == configs["a"].labels
    assert attributes.annotations == configs["a"].annotations
    assert attributes == stats_of(lab, a[:20]).attributes
    assert pods_listed(lab) == {one.id, two.id}
    assert pods_listed(lab, id=two.id[:20]) == {two.id}
    assert pods_listed(lab, label_selector={"io.kubernetes.pod.name": one.config.metadata.name}) == {one.id}
    assert not pods_listed(lab, id=two.id, label_selector={"io.kubernetes.pod.name": one.config.metadata.name})


@pytest.mark.parametrize("handler", ["runc", "crun", "wasm"])
def test_what_does_not_run_has_attributes_only(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab = shared_lab
    pod = lab.pod(handler)
    config = wasm(lab, registry, "sleep", guests.SLEEP) if handler == "wasm" else lab.shell(SLEEP)
    container = lab.cri.create(pod, config)

    def has_attributes_only() -> bool:
        one, all_ = stats_of(lab, container), listed(lab)[container]
        assert one.attributes == all_.attributes
        assert one.attributes.metadata.name == config.metadata.name
        return one == all_ == pb.ContainerStats(attributes=one.attributes)

    assert has_attributes_only()
    lab.cri.start(container)
    assert {stats_of(lab, container).HasField(name) for name in ("cpu", "memory")} == {True}
    lab.cri.stop(container)
    assert has_attributes_only()
    lab.cri.stop_pod(pod)
    assert pod.id not in pods_listed(lab)
    with refused(grpc.StatusCode.UNAVAILABLE, "is not ready"):
        pod_stats_of(lab, pod)
    lab.cri.remove_pod(pod)
    assert container not in listed(lab)
    for call in (lambda: stats_of(lab, container), lambda: pod_stats_of(lab, pod)):
        with refused(grpc.StatusCode.NOT_FOUND, "does not exist"):
            call()


def test_an_empty_id_is_an_error_of_the_request(shared_lab: Lab) -> None:
    """The kubelet sends one to learn whether pod stats are there at all: only Unimplemented would mean no."""
    for call in (lambda: stats_of(shared_lab, ""), lambda: pod_stats_of(shared_lab, Pod("", pb.PodSandboxConfig()))):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "id is empty"):
            call()


@pytest.mark.parametrize("handler", ["runc", "crun", "wasm"])
def test_what_vanishes_breaks_no_list(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab = shared_lab
    staying = lab.cri.run(lab.pod("crun"), lab.shell(SLEEP))
    config = wasm(lab, registry, "sleep", guests.SLEEP) if handler == "wasm" else lab.shell(SLEEP)
    over = threading.Event()
    lists: list[set[str]] = []
    problems: list[Exception] = []

    def look() -> None:
        with lab.daemon.client() as cri:
            while not over.is_set():
                try:
                    found = cri.runtime.ListContainerStats(pb.ListContainerStatsRequest()).stats
                    cri.runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest())
                except grpc.RpcError as error:
                    problems.append(error)
                    return
                lists.append({stats.attributes.id for stats in found if stats.HasField("cpu")})

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(8):
            pod = lab.pod(handler)
            lab.cri.run(pod, config)
            lab.cri.stop_pod(pod)
            lab.cri.remove_pod(pod)
    finally:
        over.set()
        looking.join()
    assert not problems
    assert all(staying in found for found in lists)
    assert len(set.union(*lists)) > 1


def test_figures_are_those_of_the_kernel_after_a_restart(shared_lab: Lab) -> None:
    lab = shared_lab
    container = lab.cri.run(lab.pod("crun"), lab.shell(f"i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; {SLEEP}"))
    eventually(lambda: b"sleep" in lab.cri.exec(container, ["cat", "/proc/1/cmdline"]).stdout)
    before = stats_of(lab, container)
    assert before.cpu.usage_core_nano_seconds.value > 0
    lab.daemon.restart()
    after = stats_of(lab, container)
    assert after.cpu.usage_core_nano_seconds.value >= before.cpu.usage_core_nano_seconds.value
    assert after.memory.rss_bytes.value > 0
    place = Path("/sys/fs/cgroup/cpuacct" + lab.daemon.cgroup_parent, container, "cpuacct.usage")
    if place.exists():  # cgroup v1
        assert after.cpu.usage_core_nano_seconds.value <= int(place.read_text())
