"""From the plan of a container to the `GuestSpec`. Decisions, no effects; the request has passed the refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final

import msgspec

from cri_shim.model.entry import split_function
from cri_shim.model.errors import InvalidArgument
from cri_shim.model.handler import ContainerPlan
from cri_shim.pb import api_pb2 as pb
from handlers.wasmtime import wishes
from handlers.wasmtime.guest_spec import STDIN, Entry, GuestSpec, Listen, Preopen, WorkerSpec
from handlers.wasmtime.quota import CpuLimit

_LISTEN_FDS: Final = "LISTEN_FDS"
_GENTLEST, _KEENEST = 19, 5
"""Nice values of guests: never the weight of the daemon's own threads, which are at 0."""
_SHARES: Final = 1024
"""CPU shares of a thread at nice 0 (kernel, sched/core.c: sched_prio_to_weight; one nice level is a factor 1.25)."""
_CPUS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


def guest_spec(
    plan: ContainerPlan, entry: Entry, argv0: str, preopens: tuple[Preopen, ...], identity: WorkerSpec
) -> GuestSpec:
    """Map the plan, for a module in the daemon's process."""
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
        stdin=str(plan.bundle / STDIN) if plan.config.stdin and not plan.config.tty else "",
        stdin_once=plan.config.stdin_once,
        terminal=plan.config.tty,
        http=wishes.http(plan) if entry.component else None,
        graceful=wishes.graceful(plan),
        identity=identity,
    )
    return with_limits(spec, plan.config.linux.resources)


def with_limits(spec: GuestSpec, resources: pb.LinuxContainerResources) -> GuestSpec:
    """The same guest, in the daemon's process, with these limits."""
    return msgspec.structs.replace(
        spec,
        memory_limit=max(0, resources.memory_limit_in_bytes or spec.pod_memory_limit),
        cpu=_cpu_limit(resources) or spec.pod_cpu,
        nice=nice_from_shares(resources.cpu_shares),
        shares=max(0, resources.cpu_shares),
        cpus=parse_cpus(resources.cpuset_cpus),
    )


def as_worker(spec: GuestSpec, worker: WorkerSpec) -> GuestSpec:
    """The same guest in a worker, where a cgroup has the limits and the process is in the pod's network."""
    listen = msgspec.structs.replace(spec.listen, netns="") if spec.listen is not None else None
    return msgspec.structs.replace(
        spec, worker=worker, identity=worker, listen=listen, memory_limit=0, cpu=None, nice=0, shares=0, cpus=()
    )


def further(
    spec: GuestSpec, entry: Entry, args: Sequence[str], *, has_input: bool = False, terminal: bool = False
) -> GuestSpec:
    """A further process of the same container: other arguments, streams of its own, nothing to listen on."""
    env = tuple(variable for variable in spec.env if variable[0] != _LISTEN_FDS)
    if terminal and "TERM" not in dict(env):
        env = (*env, ("TERM", "xterm"))
    return msgspec.structs.replace(
        spec,
        entry=entry,
        argv=(split_function(args[0])[0], *args[1:]),
        env=env,
        worker=spec.identity,
        listen=None,
        http=None,
        graceful=False,
        log_path="",
        stdin="/proc/self/fd/0" if has_input else "",
        stdin_once=False,
        terminal=terminal,
    )


def with_listeners(spec: GuestSpec, listen: Listen) -> GuestSpec:
    """The same guest with sockets to listen on; their number is in LISTEN_FDS (sd_listen_fds(3))."""
    others = tuple(variable for variable in spec.env if variable[0] != _LISTEN_FDS)
    return msgspec.structs.replace(spec, listen=listen, env=(*others, (_LISTEN_FDS, str(len(listen.ports)))))


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
