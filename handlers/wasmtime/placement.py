"""Where a module runs: in a thread of the daemon or in a worker process of its own, and why. A pure decision.

Invariant: a module whose file calls could do more in the daemon than its user may, or that nothing in the daemon could
end, never runs there.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import ContainerPlan
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.dispatch import ISOLATION_ANNOTATION
from cri_shim.spec.security import wanted_capabilities
from handlers.wasmtime.guest_spec import Preopen
from handlers.wasmtime.wishes import asked


class Isolation(enum.Enum):
    """Where a module runs."""

    IN_PROCESS = "in-process"
    """A thread of the daemon."""
    PROCESS = "process"
    """A worker process per container."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`why` in one clause, for the verbose status."""

    isolation: Isolation
    why: str


MOST_READERS: Final = 256
"""A module with standard input takes one of the engine's 512 threads for file calls, which all modules share."""


MOST_DESCRIPTION: Final = 256 << 10
"""Bytes (`Shape.description`). The engine keeps it decoded, in memory that no limit counts: up to 25 times as much."""


def place(  # noqa: PLR0913  all that there is to know
    plan: ContainerPlan,
    default: Isolation,
    preopens: Sequence[Preopen],
    daemon_uid: int,
    *,
    component: bool,
    readers: int = 0,
    description: int = 0,
) -> Placement:
    """The pod's or container's word, else the handler's option; unless the module must not run in the daemon.

    `readers`: modules in the daemon that have standard input. `description`: of a core module, see there.

    FailedPrecondition when it needs a worker and the daemon, without root, can make none.
    """
    placement = _wanted(plan, default)
    if placement.isolation is Isolation.IN_PROCESS:
        why = _own_ways(plan, daemon_uid, component=component, readers=readers, description=description)
        why = why or _foreign_files(plan, preopens, daemon_uid)
        placement = Placement(Isolation.PROCESS, why) if why else placement
    if placement.isolation is Isolation.PROCESS and daemon_uid != 0:
        msg = f"the Wasm module needs a process of its own: {placement.why}"
        raise FailedPrecondition(msg, hint="only a daemon with root can make one")
    return placement


def _wanted(plan: ContainerPlan, default: Isolation) -> Placement:
    value, source = asked(plan, ISOLATION_ANNOTATION)
    if value:
        return Placement(Isolation(value), source)
    return Placement(default, "the handler's option isolation")


def _own_ways(plan: ContainerPlan, daemon_uid: int, *, component: bool, readers: int, description: int) -> str:
    """What it has or asks for that no module in the daemon has; empty = nothing."""
    if component:
        return "it is a component, which only its process can end"
    if plan.config.tty:
        return "it has a terminal, which sends signals to processes"
    if plan.config.stdin and readers >= MOST_READERS:
        return f"{readers} modules in the daemon have standard input already"
    if description > MOST_DESCRIPTION:
        return "its types, imports and exports take more memory than a module in the daemon may have beside its own"
    if daemon_uid == 0 and any(map(_follows, plan.config.mounts)):
        return "a mount is to show what the node mounts in it later"
    return ""


def _follows(mount: pb.Mount) -> bool:
    """What the daemon has opened without its devices stays as it was."""
    return mount.propagation == pb.MountPropagation.PROPAGATION_HOST_TO_CONTAINER


def _foreign_files(plan: ContainerPlan, preopens: Sequence[Preopen], daemon_uid: int) -> str:
    """In the daemon file calls run with its identity. Why the container's own could do less; empty = it could not.

    Files that only the image brought, opened read-only, are everybody's.
    """
    uid = plan.process.user.uid
    everything = uid == 0 and "DAC_OVERRIDE" in wanted_capabilities(plan.config.linux.security_context)
    if everything if daemon_uid == 0 else uid in {0, daemon_uid}:
        return ""
    who = f"user {uid}" if uid else "root without DAC_OVERRIDE"
    for preopen in preopens:
        if preopen.host_backed or not preopen.readonly:
            kind = "a mount" if preopen.host_backed else "a writable root file system"
            return f"{preopen.guest} is {kind}, and the module's user is {who}"
    return ""
