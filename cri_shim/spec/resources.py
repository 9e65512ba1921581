"""Limits: cgroup settings and the score of the OOM killer.

Not where the cgroup is (`cri_shim.spec.cgroup_plan`), not their change (`cri_shim.spec.update`). Invariant: a limit is
in the spec or refused by name; 0 and empty mean "not set" (CRI v1).
"""

from __future__ import annotations

import re
from typing import Final

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.facts import Json, LimitFacts

_UNIFIED_KEY = re.compile(r"[a-z]+\.[A-Za-z0-9_.]+")
_NUMBERS = re.compile(r"[0-9]{1,9}(-[0-9]{1,9})?(,[0-9]{1,9}(-[0-9]{1,9})?)*")
"""The list format of cpuset(7)."""
FIELD: Final = "linux.resources"
NO_LIMIT: Final = -1
_SHARES = range(2, (1 << 18) + 1)
_PERIOD = range(1_000, 1_000_001)
_QUOTA = range(1_000, 1 << 44)
_BYTES = range(1, 1 << 63)
_SCORE = range(-1000, 1001)
"""Times in microseconds. Outside of these the kernel refuses, or takes another number (kernel/sched/core.c)."""


def check(asked: pb.LinuxContainerResources) -> None:
    """Refuse values that no kernel takes, whoever runs the container. InvalidArgument names the field."""
    _check_range("cpu_shares", asked.cpu_shares, _SHARES)
    _check_range("cpu_period", asked.cpu_period, _PERIOD)
    if asked.cpu_quota != NO_LIMIT:
        _check_range("cpu_quota", asked.cpu_quota, _QUOTA)
    _check_range("memory_limit_in_bytes", asked.memory_limit_in_bytes, _BYTES)
    if asked.memory_swap_limit_in_bytes != NO_LIMIT:
        _check_range("memory_swap_limit_in_bytes", asked.memory_swap_limit_in_bytes, _BYTES)
    _check_range("oom_score_adj", asked.oom_score_adj, _SCORE)
    for field, numbers in (("cpuset_cpus", asked.cpuset_cpus), ("cpuset_mems", asked.cpuset_mems)):
        if numbers and _NUMBERS.fullmatch(numbers) is None:
            msg = f"{FIELD}.{field} {numbers[:100]!r} is not a list of numbers"
            raise InvalidArgument(msg, hint="for example 0-3,8")
    if 0 < asked.memory_swap_limit_in_bytes < asked.memory_limit_in_bytes:
        msg = (
            f"{FIELD}.memory_swap_limit_in_bytes {asked.memory_swap_limit_in_bytes} is less than"
            f" memory_limit_in_bytes {asked.memory_limit_in_bytes}, which it includes"
        )
        raise InvalidArgument(msg)
    for key in asked.unified:
        if _UNIFIED_KEY.fullmatch(key) is None:
            msg = f"{FIELD}.unified: {key!r} is not the name of a file of a cgroup v2 controller"
            raise InvalidArgument(msg)


def resources(asked: pb.LinuxContainerResources, host: LimitFacts) -> Json:
    """`linux.resources` without devices (OCI runtime-spec, config-linux). Errors as in `check`, FailedPrecondition."""
    check(asked)
    wanted = {
        "cpu": _cpu(asked),
        "memory": _memory(asked, host),
        "hugepageLimits": _hugepages(asked, host),
        "unified": _unified(asked, host),
    }
    return {key: value for key, value in wanted.items() if value}


def oom_score_adj(asked: pb.LinuxContainerResources, host: LimitFacts) -> int:
    """The score that the kernel lets this daemon give: never below its own lowest."""
    return max(asked.oom_score_adj, host.lowest_oom_score_adj)


def _check_range(field: str, value: int, allowed: range) -> None:
    if value and value not in allowed:
        msg = f"{FIELD}.{field} {value} is not between {allowed[0]} and {allowed[-1]}"
        raise InvalidArgument(msg)


def _cpu(asked: pb.LinuxContainerResources) -> Json:
    wanted = {
        "shares": asked.cpu_shares,
        # Without a word a new cgroup has none; crun 1.8 cannot write "no limit" on cgroup v1.
        "quota": max(0, asked.cpu_quota),
        "period": asked.cpu_period,
        "cpus": asked.cpuset_cpus,
        "mems": asked.cpuset_mems,
    }
    return {key: value for key, value in wanted.items() if value}


def _memory(asked: pb.LinuxContainerResources, host: LimitFacts) -> Json:
    limit, both = asked.memory_limit_in_bytes, asked.memory_swap_limit_in_bytes
    if 0 < limit < host.min_memory:
        msg = f"{FIELD}.memory_limit_in_bytes {limit} is less than the {host.min_memory} that this handler needs"
        raise FailedPrecondition(msg, hint="raise the limit; on the node min_memory of the handler says what it needs")
    if both and both != limit and not host.swap_controller:
        msg = f"{FIELD}.memory_swap_limit_in_bytes: this kernel does not account for swap"
        raise FailedPrecondition(msg, hint="boot with swapaccount=1 or leave the field out")
    wanted: Json = {"limit": limit} if limit else {}
    if host.swap_controller and (both or limit):
        # Without a word on swap a limit means: that much, and no swap on top.
        wanted["swap"] = both or limit
    return wanted


def _hugepages(asked: pb.LinuxContainerResources, host: LimitFacts) -> list[Json]:
    limits = [{"pageSize": entry.page_size, "limit": entry.limit} for entry in asked.hugepage_limits]
    if host.hugetlb_controller:
        return limits
    # The kubelet sends a 0 for every page size of the node; without the controller there is nothing to limit.
    if any(entry.limit for entry in asked.hugepage_limits):
        msg = f"{FIELD}.hugepage_limits: this node has no hugetlb cgroup controller"
        raise FailedPrecondition(msg)
    return []


def _unified(asked: pb.LinuxContainerResources, host: LimitFacts) -> dict[str, str]:
    if asked.unified and host.cgroup_version < 2:
        msg = f"{FIELD}.unified: {min(asked.unified)} is a file of cgroup v2, this node runs cgroup v1"
        raise FailedPrecondition(msg)
    return dict(asked.unified)
