"""Limits as files of a cgroup, for processes that no OCI runtime runs.

From `linux.resources` of the OCI runtime-spec (`cri_shim.spec.resources`) to names and values; no I/O. Invariant: what
is in the resources is in the settings, or the caller has refused it. Sources: Documentation/admin-guide/cgroup-v1/ and
cgroup-v2.rst; the formula of weights is the one that all runtimes use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cri_shim.spec.facts import Json
from cri_shim.spec.resources import NO_LIMIT

_PERIOD: Final = 100_000
_SHARES = range(2, (1 << 18) + 1)
_WEIGHTS = range(1, 10_001)


@dataclass(frozen=True, slots=True)
class Setting:
    """A value for a file of a controller's directory."""

    controller: str
    file: str
    value: str


def settings(resources: Json, version: int) -> list[Setting]:
    """In the order in which a new cgroup takes them. `version` is that of the controllers' hierarchy."""
    return list(_v2(resources) if version > 1 else _v1(resources))


def _v1(resources: Json) -> Iterator[Setting]:
    cpu, memory = resources.get("cpu", {}), resources.get("memory", {})
    if "limit" in memory:
        yield Setting("memory", "memory.limit_in_bytes", str(memory["limit"]))
    if "swap" in memory:
        yield Setting("memory", "memory.memsw.limit_in_bytes", str(memory["swap"]))
    for key, file in (("shares", "cpu.shares"), ("period", "cpu.cfs_period_us"), ("quota", "cpu.cfs_quota_us")):
        if key in cpu:
            yield Setting("cpu", file, str(cpu[key]))
    yield from _cpuset(cpu)
    for entry in resources.get("hugepageLimits", ()):
        yield Setting("hugetlb", f"hugetlb.{entry['pageSize']}.limit_in_bytes", str(entry["limit"]))


def _v2(resources: Json) -> Iterator[Setting]:
    cpu, memory = resources.get("cpu", {}), resources.get("memory", {})
    if "limit" in memory:
        yield Setting("memory", "memory.max", _or_max(memory["limit"]))
    if "swap" in memory:
        both, limit = memory["swap"], memory.get("limit", NO_LIMIT)
        swap = both - limit if NO_LIMIT not in {both, limit} else both
        yield Setting("memory", "memory.swap.max", _or_max(swap))
    if "shares" in cpu:
        yield Setting("cpu", "cpu.weight", str(weight(cpu["shares"])))
    if "quota" in cpu or "period" in cpu:
        yield Setting("cpu", "cpu.max", f"{_or_max(cpu.get('quota', NO_LIMIT))} {cpu.get('period', _PERIOD)}")
    yield from _cpuset(cpu)
    for entry in resources.get("hugepageLimits", ()):
        yield Setting("hugetlb", f"hugetlb.{entry['pageSize']}.max", str(entry["limit"]))
    for file, value in resources.get("unified", {}).items():
        yield Setting(file.partition(".")[0], file, value)


def _cpuset(cpu: Json) -> Iterator[Setting]:
    for key, file in (("cpus", "cpuset.cpus"), ("mems", "cpuset.mems")):
        if key in cpu:
            yield Setting("cpuset", file, cpu[key])


def weight(shares: int) -> int:
    """CPU shares of v1 as a weight of v2."""
    span = (shares - _SHARES[0]) * (_WEIGHTS[-1] - _WEIGHTS[0])
    return max(_WEIGHTS[0], min(_WEIGHTS[-1], _WEIGHTS[0] + span // (_SHARES[-1] - _SHARES[0])))


def _or_max(value: int) -> str:
    return "max" if value == NO_LIMIT else str(value)
