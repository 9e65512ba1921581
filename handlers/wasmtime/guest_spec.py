"""What a guest gets: a `GuestSpec`. Values only, for the daemon and for workers.

Not the engine's types, and not how it is made (`handlers.wasmtime.guest_plan`). Invariant: it is complete. The handler
keeps it on disk, so that a later daemon can start a container that this one has created.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from cri_shim.model.ids import Digest
from cri_shim.wire.wasm_shape import UNKNOWN, Shape
from handlers.wasmtime.quota import CpuLimit

DEFAULT_FUNCTION: Final = "_start"
OPENING_SECONDS: Final = 4.0
"""What is still not opened when looked at twice, so far apart, is on a file system that does not answer."""
STDIN: Final = "stdin"
"""The FIFO in the bundle of a container with standard input."""


class Preopen(msgspec.Struct, frozen=True):
    """A directory of the host that the guest sees at `guest`. `host_backed`: it is not the container's own.

    `nodev`: there may be devices in it, which the daemon is to keep from being opened.
    """

    host: str
    guest: str
    readonly: bool
    host_backed: bool
    nodev: bool = False


class Entry(msgspec.Struct, frozen=True):
    """The module's file and the function to call. The digest is that of the bytes, whatever the path says later."""

    path: str
    digest: Digest
    function: str
    component: bool = False
    """A component (WASI 0.2), not a core module."""


class Listen(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest listens on: descriptors 3, 4, … in this order; none = only its files are counted.

    `netns`: a path; empty = the host's, or the worker's.

    `front` and `back` are the compiled forms of `handlers.wasmtime.forward`, `nothing` is an empty directory.
    """

    ports: tuple[int, ...]
    netns: str
    front: str
    back: str
    nothing: str


class Http(msgspec.Struct, frozen=True):
    """Where a component of `wasi:http/proxy` is served: address (empty = all) and port of each listener."""

    addresses: tuple[tuple[str, int], ...]
    asked: bool
    """An annotation says so: it is no default for components that serve something."""


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a module in a process of its own has besides. `limits` are `linux.resources` (OCI)."""

    why: str
    """Why the container's first process runs where it runs: in the daemon or in a worker."""
    uid: int
    gid: int
    groups: tuple[int, ...]
    capabilities: tuple[str, ...]
    oom_score_adj: int
    netns: str
    """Path of the network namespace; empty = the host's."""
    cgroup_parent: str
    limits: dict[str, Any]
    hosts: str = ""
    """Path of the file that names are looked up in; empty = there is none."""
    resolv_conf: str = ""
    """Likewise."""


class GuestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a start needs."""

    entry: Entry
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    preopens: tuple[Preopen, ...]
    memory_limit: int
    """Bytes of memory, tables and GC heap together; 0 = none but the engine's own."""
    shape: Shape = UNKNOWN
    """What the module has that the limit is for. Of a worker it does not matter."""
    pod_memory_limit: int = 0
    """What holds where the container says nothing."""
    cpu: CpuLimit | None
    pod_cpu: CpuLimit | None = None
    """Likewise."""
    nice: int
    shares: int = 0
    """CPU shares as the CRI has them; 0 = not said."""
    cpus: tuple[int, ...]
    """Empty = all."""
    log_path: str
    """Empty = output is discarded."""
    listen: Listen | None = None
    http: Http | None = None
    """None = no component, or nothing is to be served."""
    graceful: bool = False
    """Stopping closes what it listens on, and leaves the rest to the guest, until it is killed."""
    identity: WorkerSpec | None = None
    """Who a further process of the container is (exec), which is a worker wherever the first one runs."""
    worker: WorkerSpec | None = None
    """None = a thread of the daemon. In a worker the limits above are not set: its cgroup has them."""
    stdin: str = ""
    """A FIFO; empty = standard input is at its end from the start."""
    stdin_once: bool = False
    terminal: bool = False
    """All three standard streams are a terminal of its own; it has a worker then."""
