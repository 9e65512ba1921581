"""The stored facts of a container, and the state that follows from them.

    create ──▶ PENDING ──created──▶ CREATED ──started_at──▶ RUNNING ──finished_at──▶ EXITED ──remove──▶ (gone)
                  └ undone             └──── start failed: started_at = finished_at, 128, StartError ────▲

Not a live object: a record is an immutable value, replaced as a whole in the store. Invariant: state, exit code and
reason change in one replacement, so no client ever sees one without the other (contract: OOMKilled is never late).
"""

from __future__ import annotations

import enum
from typing import NewType

import msgspec

from cri_shim.model.ids import ContainerId, Digest, ImageId, PodId

ContainerName = NewType("ContainerName", str)
"""`container_pod_namespace_uid_attempt`, within the pod's own attempt: unique among the containers that exist."""


class ContainerState(enum.Enum):
    """Derived, never stored."""

    PENDING = "pending"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


class Reason(enum.StrEnum):
    """Why a container is EXITED (CRI `ContainerStatus.reason`)."""

    COMPLETED = "Completed"
    ERROR = "Error"
    OOM_KILLED = "OOMKilled"
    START_ERROR = "StartError"
    UNKNOWN = "Unknown"


class Exit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a container ended. `at` in Unix nanoseconds, `code` 0–255 (128 + n for signal n)."""

    code: int
    at: int
    reason: Reason
    message: str = ""


class User(msgspec.Struct, frozen=True):
    """Identity of the first process: numeric ids as the kernel sees them inside the container."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


class ImageVolume(msgspec.Struct, frozen=True):
    """An image whose files are mounted into a container (CRI `Mount.image`)."""

    image_id: ImageId
    layers: tuple[Digest, ...]


class ContainerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Facts of one container. Times are Unix nanoseconds, 0 = not yet."""

    version: int = 1
    id: ContainerId
    pod_id: PodId
    name: ContainerName
    config: bytes
    """The `ContainerConfig` of the request, serialised."""
    resources: bytes | None = None
    """The `LinuxContainerResources` that hold since they were updated, serialised; None = those of `config`."""
    handler: str = ""
    decision: str = ""
    """Why that handler: shown in verbose status."""
    image_id: ImageId
    image_ref: str
    """The repo digest, else the image id (CRI `ContainerStatus.image_ref`)."""
    image_name: str
    """A tag, else what the request said; kept when the image is removed."""
    layers: tuple[Digest, ...] = ()
    """Layers under the root file system: in use as long as the container exists."""
    volumes: tuple[ImageVolume, ...] = ()
    """One for each of the request's mounts that is an image volume; their layers are in use as well."""
    created_at: int
    committed: bool = False
    started_at: int = 0
    exit: Exit | None = None
    log_path: str = ""
    """Absolute, empty = no log."""
    stop_signal: int = 15
    user: User = User()
    infra: bool = False
    """The pod's own container that holds its shared PID namespace; never shown to clients."""
    pid: int = 0
    """Of the first process, while it may be running; 0 for handlers that have none."""

    @property
    def key(self) -> ContainerId:
        return self.id

    @property
    def layers_in_use(self) -> frozenset[Digest]:
        return frozenset(self.layers).union(*(volume.layers for volume in self.volumes))

    @property
    def state(self) -> ContainerState:
        if self.exit is not None:
            return ContainerState.EXITED
        if self.started_at:
            return ContainerState.RUNNING
        return ContainerState.CREATED if self.committed else ContainerState.PENDING
