"""What a guest gets: a `GuestSpec`, made from the plan of a container. Values and decisions, no effects.

Not the engine's types. Invariant: it is complete. The handler keeps it on disk, so that a later daemon can start a
container that this one has created.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final

import msgspec

from cri_shim.model.errors import InvalidArgument
from cri_shim.model.handler import ContainerPlan
from cri_shim.model.ids import Digest
from cri_shim.pb import api_pb2 as pb
from handlers.wasmtime.quota import CpuLimit

DEFAULT_FUNCTION: Final = "_start"
_GENTLEST, _KEENEST = 19, 5
"""Nice values of guests: never the weight of the daemon's own threads, which are at 0."""
_SHARES: Final = 1024
"""CPU shares of a thread at nice 0 (kernel, sched/core.c: sched_prio_to_weight; one nice level is a factor 1.25)."""
_CPUS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


class Preopen(msgspec.Struct, frozen=True):
    """A directory of the host that the guest sees at `guest`. `host_backed`: it is not the container's own."""

    host: str
    guest: str
    readonly: bool
    host_backed: bool


class Entry(msgspec.Struct, frozen=True):
    """The module's file and the function to call. The digest is that of the bytes, whatever the path says later."""

    path: str
    digest: Digest
    function: str
    component: bool = False
    """A component (WASI 0.2), not a core module."""


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a module in a process of its own has besides. `why` it has one; `limits` are `linux.resources` (OCI)."""

    why: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    capabilities: tuple[str, ...]
    oom_score_adj: int
    netns: str
    """Path of the network namespace; empty = the host's."""
    cgroup_parent: str
    limits: dict[str, Any]


class GuestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a start needs."""

    entry: Entry
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    preopens: tuple[Preopen, ...]
    memory_limit: int
    """Bytes of linear memory; 0 = none but the engine's own."""
    pod_memory_limit: int = 0
    """What holds where the container says nothing."""
    cpu: CpuLimit | None
    pod_cpu: CpuLimit | None = None
    """Likewise."""
    nice: int
    cpus: tuple[int, ...]
    """Empty = all."""
    log_path: str
    """Empty = output is discarded."""
    worker: WorkerSpec | None = None
    """None = a thread of the daemon. In a worker the limits above are not set: its cgroup has them."""


def guest_spec(plan: ContainerPlan, entry: Entry, argv0: str, preopens: tuple[Preopen, ...]) -> GuestSpec:
    """Map the plan. The request has passed `refuse`."""
    spec = GuestSpec(
        entry=entry,
        argv=(argv0, *plan.process.args[1:]),
        env=_environment(plan),
        preopens=preopens,
        # In-process use is not charged to the pod's cgroup, so the pod's limits have to hold here.
        pod_memory_limit=plan.pod.config.linux.resources.memory_limit_in_bytes,
        memory_limit=0,
        pod_cpu=_cpu_limit(plan.pod.config.linux.resources),
        cpu=None,
        nice=0,
        cpus=(),
        log_path=str(plan.log_path) if plan.log_path is not None else "",
    )
    return with_limits(spec, plan.config.linux.resources)


def with_limits(spec: GuestSpec, resources: pb.LinuxContainerResources) -> GuestSpec:
    """The same guest, in the daemon's process, with these limits."""
    return msgspec.structs.replace(
        spec,
        memory_limit=max(0, resources.memory_limit_in_bytes or spec.pod_memory_limit),
        cpu=_cpu_limit(resources) or spec.pod_cpu,
        nice=nice_from_shares(resources.cpu_shares),
        cpus=parse_cpus(resources.cpuset_cpus),
    )


def as_worker(spec: GuestSpec, worker: WorkerSpec) -> GuestSpec:
    """The same guest in a worker, where a cgroup has the limits."""
    return msgspec.structs.replace(spec, worker=worker, memory_limit=0, cpu=None, nice=0, cpus=())


def _environment(plan: ContainerPlan) -> tuple[tuple[str, str], ...]:
    variables = {name: value for name, _, value in (item.partition("=") for item in plan.process.env)}
    if plan.process.cwd not in {"", "/"}:
        # WASI preview 1 has no working directory; Go's runtime takes it from here.
        variables.setdefault("PWD", plan.process.cwd)
    return tuple(variables.items())


def _cpu_limit(resources: pb.LinuxContainerResources) -> CpuLimit | None:
    if resources.cpu_quota <= 0:
        return None
    return (
        CpuLimit(resources.cpu_quota, resources.cpu_period) if resources.cpu_period else CpuLimit(resources.cpu_quota)
    )


def nice_from_shares(shares: int) -> int:
    """The nice value whose weight is nearest to these CPU shares, always gentler than the daemon. 0 = not said."""
    level = math.log((shares or _SHARES) / _SHARES) / math.log(1.25) if shares >= 0 else 0.0
    return min(_GENTLEST, max(_KEENEST, round(-level)))


def parse_cpus(text: str) -> tuple[int, ...]:
    """A list of CPUs as in cpuset(7): `0-2,7`."""
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        found = _CPUS.fullmatch(part)
        if found is None:
            msg = f"linux.resources.cpuset_cpus: {text[:100]!r} is not a list of CPUs such as 0-2,7"
            raise InvalidArgument(msg)
        first, last = found.groups()
        cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)
