"""Linux containers by an OCI runtime: runc, crun, and any other with the same command line, by configuration alone.

Not a base for other kinds. Invariant: there is no code here for one runtime by name; what differs between binaries is
asked of the binary (`cri_shim.adapters.oci_runtime`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.monitor import Monitors
from cri_shim.adapters.oci_runtime import OciRuntime
from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.handler import Kind
from cri_shim.spec.base_spec import parse_base
from cri_shim.spec.cgroup_plan import Driver
from cri_shim.spec.facts import Json
from handlers.oci.handler import OciHandler
from handlers.oci.options import OciOptions

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
    base = _base_spec(name, options.base_spec)
    runtime = OciRuntime(
        program,
        Path(options.root) if options.root else context.layout.runtime_root(name),
        context.cgroups.host,
        pin=context.layout.mount_namespaces / name,
        systemd_cgroup=systemd,
    )
    monitors = Monitors(context.conmon, runtime, context.cgroups)
    return OciHandler(name, runtime, monitors, context, options, base)


def _base_spec(name: str, path: str) -> Json:
    if not path:
        return {}
    try:
        return parse_base(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        msg = f"handlers.{name}.base_spec: {path} cannot be used: {why}"
        raise InvalidArgument(msg) from error
