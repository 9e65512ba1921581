"""Limits as files of a cgroup, on both versions."""

from __future__ import annotations

import pytest

from cri_shim.spec.cgroup_limits import settings, weight

RESOURCES = {
    "cpu": {"shares": 512, "quota": 5000, "period": 100_000, "cpus": "0-1", "mems": "0"},
    "memory": {"limit": 10 << 20, "swap": 15 << 20},
    "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
}


def lines(version: int, **resources: object) -> list[str]:
    return [f"{setting.controller} {setting.file}={setting.value}" for setting in settings(resources, version)]


def test_v1() -> None:
    assert lines(1, **RESOURCES) == [
        "memory memory.limit_in_bytes=10485760",
        "memory memory.memsw.limit_in_bytes=15728640",
        "cpu cpu.shares=512",
        "cpu cpu.cfs_period_us=100000",
        "cpu cpu.cfs_quota_us=5000",
        "cpuset cpuset.cpus=0-1",
        "cpuset cpuset.mems=0",
        "hugetlb hugetlb.2MB.limit_in_bytes=4194304",
    ]


def test_v2() -> None:
    assert lines(2, **RESOURCES, unified={"memory.high": "9M"}) == [
        "memory memory.max=10485760",
        "memory memory.swap.max=5242880",
        "cpu cpu.weight=20",
        "cpu cpu.max=5000 100000",
        "cpuset cpuset.cpus=0-1",
        "cpuset cpuset.mems=0",
        "hugetlb hugetlb.2MB.max=4194304",
        "memory memory.high=9M",
    ]


def test_lifted_limits() -> None:
    lifted = {"cpu": {"quota": -1, "period": 100_000}, "memory": {"limit": -1, "swap": -1}}
    assert lines(1, **lifted) == [
        "memory memory.limit_in_bytes=-1",
        "memory memory.memsw.limit_in_bytes=-1",
        "cpu cpu.cfs_period_us=100000",
        "cpu cpu.cfs_quota_us=-1",
    ]
    assert lines(2, **lifted) == ["memory memory.max=max", "memory memory.swap.max=max", "cpu cpu.max=max 100000"]


@pytest.mark.parametrize(("shares", "expected"), [(2, 1), (1024, 39), (262_144, 10_000), (1, 1)])
def test_weights_are_those_of_the_other_runtimes(shares: int, expected: int) -> None:
    assert weight(shares) == expected
