"""The configuration of a handler of kind oci."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from cri_shim.model.capabilities import DEFAULT_CAPABILITIES, NAMES
from cri_shim.model.errors import InvalidArgument
from cri_shim.spec.dispatch import DEFAULT_ALLOWED_ANNOTATIONS
from cri_shim.spec.sysctls import namespace_of
from cri_shim.spec.ulimits import parse_ulimits


class OciOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of kind `oci` below `handlers:`."""

    kind: Literal["oci"] = "oci"
    path: str
    """The binary: a name on PATH or an absolute path."""
    root: str = ""
    """The runtime's own state directory; empty = below the daemon's state."""
    systemd_cgroup: Literal["auto"] | bool = "auto"
    """`auto` follows `cgroup_driver`; any other value must agree with it."""
    allowed_annotations: tuple[str, ...] = DEFAULT_ALLOWED_ANNOTATIONS
    """What a pod may set, and what is passed on to the runtime: names or globs."""
    container_handlers: tuple[str, ...] = ()
    """Handlers that a container of such a pod may ask for by annotation."""
    cdi_dirs: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    """Where CDI spec files are, read for each container that names a CDI device; later ones win."""
    min_memory: Annotated[int, msgspec.Meta(ge=0)] = 12 << 20
    """Bytes; a lower memory limit is refused. runc's own process needs this much to start a container."""
    wasm: Literal["executor", "native", "off"] = "off"
    """Who runs a Wasm image: the first handler of kind wasmtime, the runtime's own engine, nobody."""
    base_spec: str = ""
    """A file with an OCI runtime spec that adds to every container what the CRI has no field for; empty = none."""
    hooks_dirs: tuple[str, ...] = ()
    """Where hook files are (oci-hooks(5) 1.0.0), read for each container; later ones win."""
    blockio_config_file: str = ""
    """Classes of block IO (the format of goresctrl) that an annotation may name; empty = none."""
    default_capabilities: tuple[str, ...] = tuple(name for name in NAMES if name in DEFAULT_CAPABILITIES)
    """What a container has that neither adds nor drops any: names without CAP_."""
    default_env: dict[str, str] = {}
    """Variables of every container; the image and the request win."""
    default_sysctls: dict[str, str] = {}
    """Of every pod that has the namespaces for them; the request wins."""
    default_ulimits: tuple[str, ...] = ()
    """`NAME=SOFT[:HARD]`; for what is not here a container has the daemon's own limits."""
    privileged_without_host_devices: bool = False
    """A privileged container gets no device of the node that it does not ask for."""
    privileged_without_host_devices_all_devices_allowed: bool = False
    """Though there are no nodes, any device may be used: it makes its own nodes."""

    def __post_init__(self) -> None:
        # msgspec turns a ValueError into its own error, with the place in the configuration.
        parse_ulimits(self.default_ulimits)
        for name in self.default_capabilities:
            if name not in NAMES:
                raise ValueError(f"default_capabilities: Linux has no capability {name!r}")
        for name in self.default_env:
            if not name or "=" in name or "\0" in name + self.default_env[name]:
                raise ValueError(f"default_env: {name!r} cannot be an environment variable")
        for name in self.default_sysctls:
            try:
                namespace_of(name, "default_sysctls")
            except InvalidArgument as error:
                raise ValueError(str(error)) from error
        if self.privileged_without_host_devices_all_devices_allowed and not self.privileged_without_host_devices:
            raise ValueError(
                "privileged_without_host_devices_all_devices_allowed needs privileged_without_host_devices"
            )

    @property
    def cdi_paths(self) -> tuple[Path, ...]:
        return tuple(Path(directory) for directory in self.cdi_dirs)

    @property
    def hooks_paths(self) -> tuple[Path, ...]:
        return tuple(Path(directory) for directory in self.hooks_dirs)
