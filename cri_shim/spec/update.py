"""The change of a container's limits: from what holds and what is asked for to what the runtime is told.

Not the limits themselves (`cri_shim.spec.resources`). Invariant: a change and the change back are one function with its
arguments exchanged, so that what failed half-way is undone by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from cri_shim.model.errors import FailedPrecondition
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.facts import Json, LimitFacts
from cri_shim.spec.resources import FIELD, NO_LIMIT, resources

_UNSET: Final[Mapping[str, int]] = {"shares": 1024, "period": 100_000, "quota": NO_LIMIT}
"""What a new cgroup has (kernel/sched/core.c)."""
_UNSET_V2: Final = {"max": "max", "high": "max", "min": "0", "low": "0", "weight": "100"}
"""By the last part of a file's name (Documentation/admin-guide/cgroup-v2.rst)."""


@dataclass(frozen=True, slots=True)
class CpuSet:
    """What a container has that asks for none: its parent's. Empty where the host has no such controller."""

    cpus: str
    mems: str


def merge(now: pb.LinuxContainerResources, asked: pb.LinuxContainerResources) -> pb.LinuxContainerResources:
    """`now` with what is asked for in its place: 0 and empty change nothing (CRI v1, UpdateContainerResources).

    Lists are merged by key: hugepage limits by page size, `unified` by file.
    """
    result = pb.LinuxContainerResources()
    result.CopyFrom(now)
    result.MergeFrom(asked)
    limits = {entry.page_size: entry.limit for entry in result.hugepage_limits}
    del result.hugepage_limits[:]
    result.hugepage_limits.extend(pb.HugepageLimit(page_size=size, limit=limit) for size, limit in limits.items())
    return result


def change(
    now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources, host: LimitFacts, inherited: CpuSet
) -> Json:
    """What `update --resources` of an OCI runtime gets (OCI runtime-spec, config-linux): all limits of `wanted`.

    Those that only `now` has are lifted. Errors as in `cri_shim.spec.resources`; FailedPrecondition for what no runtime
    changes.
    """
    had, result = resources(now, replace(host, min_memory=0)), resources(wanted, host)
    cpu = {**_lifted_cpu(now, wanted, inherited), **result.get("cpu", {})}
    memory = {**dict.fromkeys(had.get("memory", {}), NO_LIMIT), **result.get("memory", {})}
    unified = {**_lifted_files(now, wanted), **result.get("unified", {}), **_hugepage_files(now, wanted, host)}
    if memory:
        # The kernel of cgroup v2 would kill for room; on v1 it refuses by itself.
        memory["checkBeforeUpdate"] = True
    told = {**result, "cpu": cpu, "memory": memory, "unified": unified}
    return {key: value for key, value in told.items() if value}


def without_quota(told: Json) -> Json:
    """The same, for a runtime that cannot write "no quota"."""
    return {**told, "cpu": {key: value for key, value in told["cpu"].items() if key != "quota"}}


def lifts_quota(told: Json) -> bool:
    """Whether a CPU quota that holds shall hold no more."""
    return bool(told.get("cpu", {}).get("quota") == NO_LIMIT)


def _lifted_cpu(now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources, inherited: CpuSet) -> Json:
    lifted: Json = {}
    if now.cpu_shares and not wanted.cpu_shares:
        lifted["shares"] = _UNSET["shares"]
    if now.cpu_quota > 0 and wanted.cpu_quota <= 0:
        lifted["quota"] = _UNSET["quota"]
    if now.cpu_period and not wanted.cpu_period:
        lifted["period"] = _UNSET["period"]
    if now.cpuset_cpus and not wanted.cpuset_cpus:
        lifted["cpus"] = inherited.cpus
    if now.cpuset_mems and not wanted.cpuset_mems:
        lifted["mems"] = inherited.mems
    return {key: value for key, value in lifted.items() if value}


def _lifted_files(now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources) -> dict[str, str]:
    """A file whose default is not known keeps its value."""
    gone = {key: key.rpartition(".")[2] for key in now.unified if key not in wanted.unified}
    return {key: _UNSET_V2[last] for key, last in gone.items() if last in _UNSET_V2}


def _hugepage_files(
    now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources, host: LimitFacts
) -> dict[str, str]:
    """The `update` of runc knows no hugepages, but every file of cgroup v2."""
    if not host.hugetlb_controller:
        return {}
    had = {entry.page_size: entry.limit for entry in now.hugepage_limits}
    asked = {entry.page_size: entry.limit for entry in wanted.hugepage_limits}
    if had == asked:
        return {}
    if host.cgroup_version < 2:
        msg = f"{FIELD}.hugepage_limits: cannot be changed on cgroup v1, where OCI runtimes set them only once"
        raise FailedPrecondition(msg, hint="make the container anew")
    return {f"hugetlb.{size}.max": str(asked[size]) if size in asked else "max" for size in {**had, **asked}}
