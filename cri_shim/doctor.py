"""Looks at this node for `cri-shim doctor`: the configuration, the host, and the daemon if one runs.

What it means is in `cri_shim.spec.node_report`. Invariant: it only looks.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

from cri_shim import config as configuration
from cri_shim.adapters.cgroups import Cgroups
from cri_shim.adapters.network import Network
from cri_shim.config import Config
from cri_shim.kernel import mounts
from cri_shim.loader import handler_options
from cri_shim.model.errors import CriShimError
from cri_shim.model.handler import Kind
from cri_shim.rpc.admin_client import AdminClient
from cri_shim.spec.node_report import NodeReport


def look(file: Path | None, listen: Path | None) -> NodeReport:
    """The facts. Raises InvalidArgument for a bad configuration: nothing else is of use then."""
    config, origins = configuration.load(file)
    options = handler_options(config, origins)
    handlers = {name: (each.rules.kind, str(getattr(each.options, "path", ""))) for name, each in options.items()}
    programs = [program for kind, program in handlers.values() if kind is Kind.LINUX]
    monitor, infra = config.monitor.conmon, config.monitor.infra
    host = Cgroups.detect()
    daemon, no_daemon = _daemon(listen or Path(config.listen))
    return NodeReport(
        kernel=platform.release(),
        root=os.geteuid() == 0,
        overlay="overlay" in Path("/proc/filesystems").read_text(encoding="ascii").split(),
        shared_root=any(tag.startswith("shared") for tag in mounts.propagation_of(Path("/"))),
        cgroup_version=host.version.value,
        controllers=frozenset(host.controllers),
        seccomp=Path("/proc/sys/kernel/seccomp/actions_avail").exists(),
        apparmor=Path("/sys/kernel/security/apparmor/profiles").exists(),
        user_namespaces=_number(Path("/proc/sys/user/max_user_namespaces")) > 0,
        forwarding=_number(Path("/proc/sys/net/ipv4/ip_forward")) > 0,
        free_bytes=_free(Path(config.root)),
        root_directory=config.root,
        handlers=handlers,
        monitor=monitor,
        infra=infra,
        programs=_found((*programs, monitor, infra, "iptables")),
        network=_network(config),
        conf_dir=next(iter(config.network.conf_dirs), "/etc/cni/net.d"),
        wasmtime=_wasmtime(),
        daemon=daemon,
        no_daemon=no_daemon,
    )


def _found(programs: Iterable[str]) -> dict[str, str | None]:
    return {program: shutil.which(program) for program in programs}


def _network(config: Config) -> str:
    section = config.network
    return (
        Network([Path(path) for path in section.conf_dirs], [Path(path) for path in section.bin_dirs]).status().message
    )


def _free(directory: Path) -> int:
    """Bytes at the nearest directory that is there."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _number(path: Path) -> int:
    """0 where the kernel does not have it."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _wasmtime() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("wasmtime")
    return ""


def _daemon(listen: Path) -> tuple[str, str]:
    try:
        with AdminClient(listen) as client:
            return client.version(), ""
    except CriShimError as error:
        return "", str(error)
