"""What was read from the host before a spec is built: values only, so that the same facts give the same spec.

Not the readers (`handlers.oci`). Invariant: nothing in `cri_shim.spec` asks the host; what is not here is not known.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cri_shim.model.capabilities import DEFAULT_CAPABILITIES
from cri_shim.spec.cdi import Edits
from cri_shim.spec.cgroup_plan import Driver
from cri_shim.spec.hooks import HookFile

Json = dict[str, Any]
"""A JSON object; config.json is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitFacts:
    """What the limits of a container depend on, whatever runs it."""

    lowest_oom_score_adj: int
    cgroup_version: int
    """1 on hybrid hosts too: the controllers decide."""
    cgroup_driver: Driver = Driver.CGROUPFS
    swap_controller: bool = False
    hugetlb_controller: bool = False
    min_memory: int = 0
    """Bytes that a container of this handler needs at least, by configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts(LimitFacts):
    """The same for every container of a runtime."""

    oci_version: str
    """The `ociVersion` that the runtime's binary knows."""
    capabilities: frozenset[str]
    """The daemon's own, names without CAP_: nobody can give more than he has."""
    machine: str = "x86_64"
    """As uname(2) says it."""
    seccomp: bool = True
    apparmor: bool = False
    apparmor_parser: bool = False
    """The program that loads profiles: without it there is no default one."""
    selinux: bool = False
    recursive_read_only: bool = False
    """Runtime and kernel know recursive read-only bind mounts."""
    idmapped_mounts: bool = False
    """Both know idmapped mounts."""
    wasm_engine: bool = False
    """The runtime's binary was built with one."""
    default_capabilities: frozenset[str] = DEFAULT_CAPABILITIES
    """Of a container that neither adds nor drops any."""
    rlimits: tuple[Json, ...] = ()
    """`process.rlimits` of every container."""
    base_spec: Json = field(default_factory=dict)
    """What the handler's base spec adds to every container."""
    privileged_any_device: bool = True
    """Whether a privileged container may use devices that it does not ask for."""


class Propagation(enum.Enum):
    """Of the mount that a path is on (mount_namespaces(7))."""

    PRIVATE = "private"
    SLAVE = "slave"
    SHARED = "shared"


@dataclass(frozen=True, slots=True)
class MountSource:
    """A `host_path` with all its symlinks resolved."""

    path: str
    propagation: Propagation = Propagation.PRIVATE
    restrictions: tuple[str, ...] = ()
    """Of nosuid, nodev and noexec those of the mount that it is on: runtimes drop what the spec does not repeat."""


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device of the host. `path` is below the `host_path` that was asked for, empty when it is that path itself."""

    path: str
    block: bool
    major: int
    minor: int
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """Read for one container, by what its configuration names."""

    sources: Mapping[str, MountSource] = field(default_factory=dict)
    """By `Mount.host_path`, as given."""
    devices: Mapping[str, tuple[DeviceNode, ...]] = field(default_factory=dict)
    """By `Device.host_path`, as given; a directory gives every device below it. `/dev` for a privileged container."""
    seccomp: Json | None = None
    """The content of a Localhost profile."""
    apparmor_profiles: frozenset[str] = frozenset()
    """Names of those that are loaded."""
    apparmor_problem: str = ""
    """Why the default one is not."""
    block_io: Json = field(default_factory=dict)
    """`blockIO` of the class that an annotation names."""
    hooks: tuple[HookFile, ...] = ()
    """The node's hooks; whether one fits is not known yet."""
    cdi: Edits = field(default_factory=Edits)
    """What the request's CDI devices change; every device node has its type and numbers."""
