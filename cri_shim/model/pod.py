"""The stored facts of a pod sandbox, and the state that follows from them.

    run_pod ──▶ PENDING ──ready_at──▶ READY ──stopped_at──▶ NOTREADY ──remove──▶ (gone)
                   └────── undone, or stopped_at when the undo failed ──▲

Not a live object: a record is an immutable value, replaced as a whole in the store. Invariant: it is persisted before
the first side effect, so a crash at any point leaves a record that recovery finishes or undoes.
"""

from __future__ import annotations

import enum
from typing import NewType

import msgspec

from cri_shim.model.ids import PodId

PodName = NewType("PodName", str)
"""`name_namespace_uid_attempt`: unique among the pods that exist."""


class PodState(enum.Enum):
    """Derived, never stored."""

    PENDING = "pending"
    READY = "ready"
    NOTREADY = "notready"


class PodRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Facts of one pod. Times are Unix nanoseconds, 0 = not yet."""

    version: int = 1
    id: PodId
    name: PodName
    config: bytes
    """The `PodSandboxConfig` of the request, serialised."""
    overhead: bytes | None = None
    """`LinuxContainerResources` as last updated, serialised; None = as in `config`."""
    resources: bytes | None = None
    """Likewise for all containers of the pod together."""
    runtime_handler: str
    """As asked for; empty = the default."""
    handler: str
    """The configured handler that serves the pod."""
    created_at: int
    ready_at: int = 0
    stopped_at: int = 0
    boot_id: str = ""
    """Of the boot that the pod's namespaces belong to."""
    selinux_level: str = ""
    """Of all files and processes of the pod; empty where nothing is labelled."""
    ips: tuple[str, ...] = ()
    networked: bool = False
    """A CNI ADD may have taken effect and no DEL has succeeded since."""
    attachment: bytes | None = None
    """What the CNI DEL needs: configuration and result of the ADD; None when the ADD was not seen to end."""
    detach_failures: int = 0
    """How often the CNI DEL has failed in a row."""
    detach_failed_at: int = 0
    """When it failed first."""
    problem: str = ""
    """Why the pod is not ready, when that was not asked for; what had to be given up when it was stopped."""

    @property
    def key(self) -> PodId:
        return self.id

    @property
    def state(self) -> PodState:
        if self.stopped_at:
            return PodState.NOTREADY
        return PodState.READY if self.ready_at else PodState.PENDING
