"""Reading the accounts: of cgroups, of network namespaces, of writable layers."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.adapters.cgroups import CgroupHost, Cgroups, Version
from cri_shim.adapters.layer_usage import LayerSizes
from cri_shim.adapters.stats import ContainerTarget, CpuRates, PodTarget, StatsReader
from cri_shim.kernel import namespaces
from cri_shim.model.ids import ContainerId, new_container_id
from cri_shim.model.layout import Layout
from cri_shim.spec.cgroup_stats import V2_FILES, guest_usage
from tests.support.leftovers import CGROUP_PREFIX, remove_cgroup

SECOND = 1_000_000_000
CONTAINER = ContainerTarget("a" * 64, "pods/one/main")


@pytest.fixture
def unified(tmp_path: Path) -> CgroupHost:
    """A host with cgroup v2 only, as far as its files go."""
    place = tmp_path / CONTAINER.cgroup
    place.mkdir(parents=True)
    for name, text in {
        "cpu.stat": "usage_usec 2000\n",
        "cpu.pressure": Path("/proc/pressure/cpu").read_text(),
        "memory.current": "8192\n",
        "memory.max": "max\n",
        "memory.stat": "anon 4096\ninactive_file 1024\n",
        "cgroup.procs": "10\n11\n",
    }.items():
        (place / name).write_text(text)
    (place / "init").mkdir()
    (place / "init" / "cgroup.procs").write_text("12\n")
    return CgroupHost(Version.V2, {}, (tmp_path,), tmp_path)


def test_v2(unified: CgroupHost) -> None:
    before = time.time_ns()
    (reading,) = StatsReader(unified).containers([CONTAINER])
    assert reading is not None
    assert before <= reading.at <= time.time_ns()
    assert reading.usage.cpu is not None
    assert reading.usage.cpu.usage_ns == 2_000_000
    assert reading.usage.cpu.pressure is not None
    assert reading.usage.memory is not None
    assert (reading.usage.memory.usage, reading.usage.memory.working_set) == (8192, 7168)
    assert reading.usage.swap is None


def test_what_is_gone_and_what_was_never_there(unified: CgroupHost) -> None:
    gone = ContainerTarget("b" * 64, "pods/one/gone")
    nowhere = ContainerTarget("c" * 64, "")
    readings = StatsReader(unified).containers([gone, CONTAINER, nowhere])
    assert [reading is not None for reading in readings] == [False, True, False]


def test_a_pod_counts_guests_that_are_not_in_its_cgroup(unified: CgroupHost) -> None:
    guest = ContainerTarget("g" * 64, "", lambda: guest_usage(500, 100, 100, 0))
    assert unified.unified is not None
    for name, text in {"cpu.stat": "usage_usec 3000\n", "memory.current": "9000\n", "memory.stat": "anon 1\n"}.items():
        (unified.unified / "pods" / "one" / name).write_text(text)

    def total(cgroup: str) -> tuple[int, int, int]:
        pod = PodTarget("p" * 64, cgroup, None, (CONTAINER, guest))
        ((reading, containers),) = StatsReader(unified).pods([pod])
        assert all(each is not None for each in containers)
        assert reading.total.usage.cpu is not None
        assert reading.total.usage.memory is not None
        return reading.total.usage.cpu.usage_ns, reading.total.usage.memory.usage, reading.processes

    assert total("pods/one") == (3_000_500, 9100, 3)
    assert total("") == (2_000_500, 8292, 3)  # no cgroup of its own: the sum
    assert total("pods/gone") == (500, 100, 3)


@pytest.mark.root
def test_a_cgroup_of_this_kernels_own_version_two() -> None:
    root = Cgroups.detect().unified
    if root is None:
        pytest.skip("no cgroup v2 is mounted")
    name = f"{CGROUP_PREFIX}stats-{os.getpid()}"
    (root / name).mkdir()
    try:
        with subprocess.Popen(["sleep", "60"]) as child:
            (root / name / "cgroup.procs").write_text(str(child.pid))
            reader = StatsReader(CgroupHost(Version.V2, {}, (root,), root))
            pod = PodTarget("p", name, None, (ContainerTarget("c", name),))
            ((reading, _),) = reader.pods([pod])
            child.kill()
        assert reading.processes == 1
        cpu = reading.total.usage.cpu
        assert cpu is not None
        assert cpu.usage_ns < SECOND
        assert (cpu.pressure is not None) == (root / name / "cpu.pressure").exists()
        assert (reading.total.usage.io is not None) == (root / name / "io.pressure").exists()
        assert set(V2_FILES) >= {"cpu.pressure", "io.pressure"}
    finally:
        remove_cgroup(name)


@pytest.fixture
def netns(tmp_path: Path) -> Iterator[Path]:
    namespaces.pin_namespaces(tmp_path / "ns", net=True, ipc=False, uts=False, hostname="", sysctls={})
    yield tmp_path / "ns" / "net"
    namespaces.unpin(tmp_path / "ns")


@pytest.mark.root
def test_networks_of_pods_that_are_there_and_of_those_that_are_gone(
    unified: CgroupHost, netns: Path, tmp_path: Path
) -> None:
    links = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other"]
    subprocess.run(["nsenter", f"--net={netns}", *links], check=True)
    (tmp_path / "stale").touch()  # the file that a lost bind mount leaves
    places = [tmp_path / "gone", netns, tmp_path / "stale", None]
    pods = [PodTarget(f"{number}", "", place, ()) for number, place in enumerate(places)]
    networks = [reading.network for reading, _ in StatsReader(unified).pods(pods)]
    assert [None if network is None else [each.name for each in network] for network in networks] == [
        None,
        ["eth0", "other"],
        None,
        None,
    ]
    assert "eth0" not in Path("/proc/self/net/dev").read_text()


def test_a_rate_needs_two_samples_a_second_apart() -> None:
    rates = CpuRates()
    assert rates.rate("a", 0, 1000) is None
    assert rates.rate("a", SECOND // 2, 5000) is None
    assert rates.rate("a", 2 * SECOND, SECOND + 1000) == SECOND // 2
    assert rates.rate("a", 2 * SECOND + 1, 9 * SECOND) == SECOND // 2  # too soon: the rate from before
    assert rates.rate("b", 3 * SECOND, 0) is None
    assert rates.rate("a", 4 * SECOND, SECOND + 1000) == 0
    assert rates.rate("a", 3 * SECOND, SECOND + 1000) == 0  # the clock was set back
    assert rates.rate("a", 5 * SECOND, 0) == 0
    rates.keep({"b"})
    assert rates.rate("a", 9 * SECOND, SECOND) is None
    assert rates.rate("b", 4 * SECOND, 4 * SECOND) == 4 * SECOND


async def test_sizes_of_writable_layers(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "root", tmp_path / "state")
    one, two, artifact = (new_container_id() for _ in range(3))

    def write(container: ContainerId, name: str, size: int) -> None:
        upper = layout.writable(container) / "upper"
        upper.mkdir(parents=True, exist_ok=True)
        (upper / name).write_bytes(b"x" * size)

    sizes = LayerSizes(layout)
    write(one, "file", 1 << 20)
    assert sizes.latest(one) is None
    await sizes.measure([one, artifact], {})
    first = sizes.latest(one)
    assert first is not None
    assert (first.used_bytes >> 20, first.inodes) == (1, 2)
    nothing = sizes.latest(artifact)
    assert nothing is not None
    assert (nothing.used_bytes, nothing.inodes) == (0, 0)
    # A figure that is fresh stays, a new container is measured at once, one that is gone is forgotten.
    write(one, "more", 1 << 20)
    write(two, "file", 3 << 20)
    await sizes.measure([one, two], {})
    assert sizes.latest(one) is first
    second = sizes.latest(two)
    assert second is not None
    assert second.used_bytes >> 20 == 3
    assert sizes.latest(artifact) is None
    assert sizes.total() == (first.used_bytes + second.used_bytes, first.inodes + second.inodes)
    # One that has ended since is measured once more, and then no more.
    await sizes.measure([two], {one: time.time_ns()})
    last = sizes.latest(one)
    assert last is not None
    assert last.used_bytes >> 20 == 2
    await sizes.measure([two], {one: last.at})
    assert sizes.latest(one) is last
