"""What systemd is told of the limits of a scope."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_shim.spec.cgroup_limits import Setting, settings
from cri_shim.spec.scope_limits import mask, scope_limits


def test_all_that_has_a_property() -> None:
    resources = {
        "memory": {"limit": 64 << 20, "swap": 96 << 20},
        "cpu": {"shares": 1024, "quota": 5_000, "period": 100_000, "cpus": "0,2-3", "mems": "0"},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
        "unified": {"memory.high": "1000", "pids.max": "max", "io.weight": "50"},
    }
    assert scope_limits(settings(resources, 2)) == {
        "MemoryMax": 64 << 20,
        "MemorySwapMax": 32 << 20,
        "CPUWeight": 39,
        "CPUQuotaPerSecUSec": 50_000,
        "CPUQuotaPeriodUSec": 100_000,
        "AllowedCPUs": b"\x0d",
        "AllowedMemoryNodes": b"\x01",
        "MemoryHigh": 1000,
        "TasksMax": (1 << 64) - 1,
    }
    assert scope_limits(settings({"cpu": {"quota": -1}}, 2))["CPUQuotaPerSecUSec"] == (1 << 64) - 1


@pytest.mark.parametrize("value", ["", "a", "3-1", "-1", "0-99999999"])
def test_what_the_kernel_refuses_is_left_to_it(value: str) -> None:
    assert scope_limits([Setting("cpuset", "cpuset.cpus", value), Setting("memory", "memory.max", "7")]) == {
        "MemoryMax": 7
    }


@given(st.sets(st.integers(0, 200), min_size=1))
def test_a_mask_has_a_bit_for_each_cpu(cpus: set[int]) -> None:
    bits = int.from_bytes(mask(",".join(map(str, sorted(cpus)))), "little")
    assert {number for number in range(201) if bits >> number & 1} == cpus
