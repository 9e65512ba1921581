"""The change of limits: how requests are merged, what a runtime is told, and the way back."""

from __future__ import annotations

import dataclasses

import pytest

from cri_shim.model.errors import CriShimError, FailedPrecondition, Internal
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.facts import HostFacts, Json
from cri_shim.spec.update import CpuSet, change, lifts_quota, merge, without_quota
from cri_shim.wire.oci_update import update_error

V1 = HostFacts(
    oci_version="1.0.2", capabilities=frozenset(), lowest_oom_score_adj=0, cgroup_version=1, swap_controller=True
)
V2 = dataclasses.replace(V1, cgroup_version=2, hugetlb_controller=True)
NONE = pb.LinuxContainerResources()


def limits(**fields: object) -> pb.LinuxContainerResources:
    return pb.LinuxContainerResources(**fields)  # type: ignore[arg-type]


def pages(**by_size: int) -> list[pb.HugepageLimit]:
    return [pb.HugepageLimit(page_size=size, limit=limit) for size, limit in by_size.items()]


def told(now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources, host: HostFacts = V1) -> Json:
    return change(now, wanted, host, CpuSet("0-3", "0-1"))


def test_what_is_not_said_stays() -> None:
    now = limits(cpu_shares=512, cpuset_cpus="0", unified={"a.b": "1", "c.d": "2"}, hugepage_limits=pages(A=1, B=2))
    asked = limits(cpu_shares=100, oom_score_adj=5, unified={"c.d": "3"}, hugepage_limits=pages(B=0, C=4))
    result = merge(now, asked)
    assert result == limits(
        cpu_shares=100,
        cpuset_cpus="0",
        oom_score_adj=5,
        unified={"a.b": "1", "c.d": "3"},
        hugepage_limits=pages(A=1, B=0, C=4),
    )
    assert merge(now, NONE) == now
    assert now.cpu_shares == 512


def test_everything_that_is_wanted_is_told() -> None:
    wanted = limits(cpu_shares=512, cpu_quota=2000, cpu_period=1000, cpuset_cpus="1", memory_limit_in_bytes=100)
    assert told(NONE, wanted) == {
        "cpu": {"shares": 512, "quota": 2000, "period": 1000, "cpus": "1"},
        "memory": {"limit": 100, "swap": 100, "checkBeforeUpdate": True},
    }
    assert told(NONE, NONE) == {}


def test_the_way_back_lifts_what_was_not_there() -> None:
    had = limits(
        cpu_shares=512, cpu_quota=2000, cpu_period=1000, cpuset_cpus="1", cpuset_mems="0", memory_limit_in_bytes=100
    )
    assert told(had, NONE) == {
        "cpu": {"shares": 1024, "quota": -1, "period": 100_000, "cpus": "0-3", "mems": "0-1"},
        "memory": {"limit": -1, "swap": -1, "checkBeforeUpdate": True},
    }
    assert change(limits(cpuset_cpus="1"), NONE, V1, CpuSet("", "")) == {}
    files = {"memory.max": "5", "memory.high": "4", "memory.low": "3", "cpu.weight": "7", "io.odd": "1"}
    lifted = {"memory.max": "max", "memory.high": "max", "memory.low": "0", "cpu.weight": "100"}
    assert told(limits(unified=files), NONE, V2) == {"unified": lifted}


def test_a_quota_ends_only_once() -> None:
    lifting = told(limits(cpu_quota=2000, cpu_period=1000), limits(cpu_quota=-1, cpu_period=1000))
    assert lifting == {"cpu": {"quota": -1, "period": 1000}}
    assert lifts_quota(lifting)
    assert without_quota(lifting) == {"cpu": {"period": 1000}}
    assert told(limits(cpu_quota=-1), limits(cpu_quota=-1, cpu_shares=10)) == {"cpu": {"shares": 10}}
    assert not lifts_quota({})


def test_hugepages_are_files_of_cgroup_v2() -> None:
    now, wanted = limits(hugepage_limits=pages(**{"2MB": 1, "1GB": 0})), limits(hugepage_limits=pages(**{"2MB": 9}))
    assert told(now, wanted, V2)["unified"] == {"hugetlb.2MB.max": "9", "hugetlb.1GB.max": "max"}
    assert "unified" not in told(wanted, wanted, V2)
    with pytest.raises(FailedPrecondition, match=r"hugepage_limits: cannot be changed on cgroup v1"):
        told(now, wanted, dataclasses.replace(V1, hugetlb_controller=True))
    with pytest.raises(FailedPrecondition, match=r"hugepage_limits: this node has no hugetlb"):
        told(now, wanted)
    # As the kubelet sends it to a node without the controller.
    assert told(NONE, limits(hugepage_limits=pages(**{"2MB": 0})), V1) == {}


def test_the_least_memory_holds_for_what_is_wanted() -> None:
    host = dataclasses.replace(V1, min_memory=100)
    low, enough = limits(memory_limit_in_bytes=99), limits(memory_limit_in_bytes=100)
    assert told(low, enough, host)["memory"]["limit"] == 100
    with pytest.raises(FailedPrecondition, match="memory_limit_in_bytes 99 is less than the 100"):
        told(enough, low, host)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (
            'failed to write "99": write /sys/fs/cgroup/cpuset/p/cpuset.cpus: numerical result out of range',
            "cpuset_cpus",
        ),
        ("writing file `cpuset.mems`: Invalid argument", "cpuset_mems"),
        ("unable to set memory limit to 4096 (current usage: 2236416, peak usage: 2768896)", "memory_limit_in_bytes"),
        ("writing file `memory.limit_in_bytes`: Device or resource busy", "memory_limit_in_bytes"),
        ("writing file `memory.memsw.limit_in_bytes`: Invalid argument", "memory_swap_limit_in_bytes"),
        ('failed to write "5": write /sys/fs/cgroup/p/memory.swap.max: x', "memory_swap_limit_in_bytes"),
        ("writing file `cpu.cfs_quota_us`: Invalid argument", "cpu_quota"),
        ("writing file `cpu.cfs_period_us`: Invalid argument", "cpu_period"),
        ("writing file `cpu.weight`: Invalid argument", "cpu_shares"),
        ("open `/sys/fs/cgroup/hugetlb/x`: No such file or directory", "hugepage_limits"),
        ("writing file `io.latency`: Invalid argument", "unified"),
    ],
)
def test_an_error_names_the_field_and_keeps_the_words(said: str, field: str) -> None:
    error = update_error(said)
    assert isinstance(error, FailedPrecondition)
    assert str(error).startswith(f"linux.resources.{field} cannot be changed: {said}")


@pytest.mark.parametrize("said", ["", "container does not exist"])
def test_an_error_that_names_nothing(said: str) -> None:
    error: CriShimError = update_error(said)
    assert isinstance(error, Internal)
    assert said in str(error)
