"""Linux containers by an OCI runtime: runc, crun, and any other with the same command line, by configuration alone.

Not a base for other kinds. Invariant: there is no code here for one runtime by name; what differs between binaries is
asked of the binary (`cri_shim.adapters.oci_runtime`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.monitor import Monitors
from cri_shim.adapters.oci_runtime import OciRuntime
from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.handler import Kind
from cri_shim.spec.cgroup_plan import Driver
from cri_shim.spec.dispatch import DEFAULT_ALLOWED_ANNOTATIONS
from handlers.oci.handler import OciHandler, Settings


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


KIND = Kind.LINUX
OPTIONS = OciOptions


def make(name: str, options: OciOptions, context: HandlerContext) -> OciHandler:
    """Build the handler. FailedPrecondition when its binary is missing, InvalidArgument for a contradiction."""
    systemd = context.cgroups.driver is Driver.SYSTEMD
    if options.systemd_cgroup not in {"auto", systemd}:
        msg = f"handlers.{name}.systemd_cgroup is {options.systemd_cgroup}, but cgroup_driver says otherwise"
        raise InvalidArgument(msg, hint="leave it on auto, or set cgroup_driver")
    program = shutil.which(options.path)
    if program is None:
        msg = f"handlers.{name}.path: there is no program {options.path}"
        raise FailedPrecondition(msg, hint="install it, or take the handler out of the configuration")
    runtime = OciRuntime(
        program,
        Path(options.root) if options.root else context.layout.runtime_root(name),
        context.cgroups.host,
        pin=context.layout.mount_namespaces / name,
        systemd_cgroup=systemd,
    )
    monitors = Monitors(context.conmon, runtime, context.cgroups)
    cdi_dirs = tuple(Path(directory) for directory in options.cdi_dirs)
    return OciHandler(name, runtime, monitors, context, Settings(cdi_dirs, options.min_memory))
