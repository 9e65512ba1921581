"""What a runtime kind is to the rest of the daemon: the `Handler` protocol and the values that pass through it.

Not a base class: a handler is any object with these verbs; `handlers/` holds ours, the entry-point group
`cri_shim.handlers` names others. Invariant: every verb that ends or removes is idempotent and works by id alone, also
for a container that an earlier daemon made half of.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from cri_shim.model.container import ContainerRecord, Exit, User
from cri_shim.model.ids import ContainerId, Digest, PodId
from cri_shim.model.image import ImageRecord
from cri_shim.model.selinux import Label
from cri_shim.model.streams import TerminalSize
from cri_shim.model.user_namespace import UserNamespace
from cri_shim.pb import api_pb2 as pb


class Kind(enum.Enum):
    """What a handler runs."""

    LINUX = "linux"
    WASM = "wasm"


@dataclass(frozen=True, slots=True)
class Features:
    """What goes into `Status.runtime_handlers[].features`."""

    recursive_read_only_mounts: bool = False
    no_user_namespaces: str = "it has not been probed"
    """Why pods of the handler cannot have user namespaces; empty = they can."""


@dataclass(frozen=True, slots=True)
class PodContext:
    """What the containers of a pod share. A namespace path of None means the host's."""

    id: PodId
    config: pb.PodSandboxConfig
    hostname: str
    cgroup_parent: str
    net: Path | None
    ipc: Path | None
    uts: Path | None
    pid: Path | None
    """The shared PID namespace, for containers that ask for POD; None = the pod has none."""
    shm: Path
    resolv_conf: Path
    hosts: Path
    hostname_file: Path
    user: Path | None = None
    ids: UserNamespace | None = None
    """Of the user namespace."""
    selinux: Label | None = None
    """Of the pod; None where nothing is labelled."""


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """The process to run, resolved from the request, the image and the image's user database."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    """`NAME=value`, later ones already won."""
    cwd: str
    user: User
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """Everything that a handler needs to create a container."""

    id: ContainerId
    pod: PodContext
    config: pb.ContainerConfig
    process: ProcessPlan
    image: ImageRecord | None
    """None for the pod's own infra container."""
    rootfs: Path | None
    """The mounted root file system; None for a Wasm artifact, which has none."""
    bundle: Path
    """A directory of the container's own, made before `create`; closed to everybody but root and root of the pod."""
    log_path: Path | None
    """Absolute; its directory exists. None = output is discarded."""
    stop_signal: int
    target_pid: int = 0
    """First process of the container whose PID namespace is joined (NamespaceMode TARGET)."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    """For the runtime: the standard ones and those the handler's `allowed_annotations` pass."""
    infra: bool = False
    selinux: Label | None = None
    """Of the container; None where nothing is labelled."""


@dataclass(frozen=True, slots=True)
class Started:
    """A first process is running. `pid` is 0 where there is none."""

    pid: int
    at: int
    """Unix nanoseconds."""


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """A further process in a running container: user, environment and limits are those of the first one."""

    args: tuple[str, ...]
    stdin: int | None
    """File descriptors, owned by the caller; None = end-of-file at once."""
    stdout: int
    stderr: int


@dataclass(frozen=True, slots=True)
class TerminalRequest:
    """The same with a new terminal for all three streams."""

    args: tuple[str, ...]
    size: TerminalSize | None
    """None = not known yet."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a container has written, at most PIECE_BYTES of it."""

    data: bytes
    is_error: bool
    """Whether to standard error; never with a terminal."""


@dataclass(frozen=True, slots=True)
class HandlerStats:
    """What a container uses that is in no cgroup of its own. In ns of CPU since its start, and in bytes."""

    cpu_ns: int
    memory: int
    memory_limit: int
    """0 = none."""
    resident: Callable[[], int]
    """Looks how much of the memory there is. Takes the longer the more; for a thread."""


class ExecSession(Protocol):
    """One exec'ed process."""

    @property
    def terminal(self) -> int:
        """The master end of its terminal, the caller's to close; -1 without a terminal."""
        ...

    async def wait(self) -> int:
        """The exit status, 128 + n for signal n."""
        ...

    async def kill(self) -> None:
        """SIGKILL to the process and all its descendants; returns when they are gone."""
        ...


class Attachment(Protocol):
    """One client at the streams of a container's first process, which does not notice it come and go."""

    async def read(self) -> Piece | None:
        """What is written from now on; None when the container has ended. Unread output stops the container."""
        ...

    async def write(self, data: bytes) -> None:
        """To its standard input. ConnectionError when nothing more can be written."""
        ...

    async def end_input(self) -> None:
        """The client has no more input: in a `stdin_once` container the end for all, else it means nothing."""
        ...

    async def resize(self, size: TerminalSize) -> None:
        """Of its terminal; nothing without one."""
        ...

    async def aclose(self) -> None:
        """Leave. A second call does nothing."""
        ...


class Handler(Protocol):
    """A way to run containers. Errors are `CriShimError`s; their text reaches the pod's events."""

    name: str
    kind: Kind
    features: Features

    async def probe(self) -> None:
        """Ask the node for what `features` says; called once, while the daemon starts."""
        ...

    async def create(self, plan: ContainerPlan) -> None:
        """Make the container, ready to start; nothing of the user's has run. On error nothing is left."""
        ...

    async def start(self, container_id: ContainerId) -> Started:
        """Run it. From now on the end is told to `HandlerContext.exited`, exactly once."""
        ...

    async def update(
        self, container_id: ContainerId, now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources
    ) -> None:
        """Change the limits of a created or running container; both are complete, 0 and empty = none.

        On error those of `now` hold again, as far as the kernel lets them. Ended meanwhile = success.
        """
        ...

    async def kill(self, container_id: ContainerId, signal: int, *, everyone: bool = False) -> None:
        """Send a signal to the first process, or to every process. Not running = success."""
        ...

    async def delete(self, container_id: ContainerId, cgroup_parent: str) -> None:
        """Kill what runs and remove everything that `create` made. Unknown = success.

        Files in the bundle, which the caller removes next, may stay.
        """
        ...

    async def exec(self, container_id: ContainerId, request: ExecRequest | TerminalRequest) -> ExecSession:
        """Start a further process. CannotExecute when the container has no such program."""
        ...

    async def attach(self, container_id: ContainerId, *, stdin: bool) -> Attachment:
        """Be another client of the first process's streams, with input if `stdin`.

        FailedPrecondition when the container does not run.
        """
        ...

    async def reopen_log(self, container_id: ContainerId) -> None:
        """New lines go to a new file at the log path when this returns; on error no new file is left."""
        ...

    async def adopt(self, record: ContainerRecord, plan: ContainerPlan) -> Exit | Started | None:
        """Take over a CREATED or RUNNING container of an earlier daemon.

        An Exit when it has ended meanwhile, a Started when it runs though the record says CREATED, None when all is as
        the record says.
        """
        ...

    def info(self, container_id: ContainerId) -> Mapping[str, object]:
        """What verbose status shows: JSON values, from memory."""
        ...

    def stats(self, container_id: ContainerId) -> HandlerStats | None:
        """What a container uses, from memory; None when its cgroup tells, or it was never started.

        After its end the CPU time stays what it was, and the memory is 0.
        """
        ...

    async def aclose(self) -> None:
        """The daemon stops: release what cannot outlive it, leave the rest running."""
        ...


@runtime_checkable
class CompilesAhead(Protocol):
    """What a handler may be besides: one that does, when an image comes, what its first container would wait for."""

    async def compile_ahead(self, module: Path, digest: Digest, name: str) -> None:
        """Compile a Wasm module, whose bytes have this digest, unless it is compiled; `name` is for errors.

        InvalidArgument when it is none, or one that no container could run.
        """
        ...
