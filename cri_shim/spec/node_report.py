"""What a node has, what it lacks, and how to get it: facts in, findings in words out. Pure.

Not what the daemon does without something: that it says itself, at start and in Status. Invariant: whatever is lacking
comes with a way to get it.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from cri_shim.model.handler import Kind

_CONTROLLERS: Final = ("cpu", "memory", "pids", "cpuset")
_LITTLE_SPACE: Final = 1 << 30
_PACKAGES: Final = {
    "runc": "runc",
    "crun": "crun",
    "conmon": "conmon",
    "catatonit": "catatonit",
    "iptables": "iptables",
}
"""Debian's names."""


class Level(enum.Enum):
    """How much a finding matters; the value is how it is printed."""

    HAS = "has"
    NOTE = "note"
    LACKS = "LACKS"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line; `hint` says how to get what is lacking."""

    level: Level
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """The facts. Programs are paths, None where there is none."""

    kernel: str
    root: bool
    overlay: bool
    shared_root: bool
    """`/` is a shared mount."""
    cgroup_version: str
    controllers: frozenset[str]
    seccomp: bool
    apparmor: bool
    user_namespaces: bool
    forwarding: bool
    """net.ipv4.ip_forward."""
    free_bytes: int
    root_directory: str
    handlers: Mapping[str, tuple[Kind, str]]
    """Kind, and the name of the program; empty for one without."""
    monitor: str
    infra: str
    programs: Mapping[str, str | None]
    """Where the programs of the handlers, the monitor, the infra container and iptables are."""
    network: str
    """Why pods cannot be attached; empty when they can."""
    conf_dir: str
    wasmtime: str
    """Version of the engine; empty without."""
    daemon: str
    """Version of the one that runs; empty when none answers."""
    no_daemon: str
    """Why none answers."""


def findings(report: NodeReport) -> Iterator[Finding]:
    """Every fact that matters, the host first."""
    yield from _host(report)
    yield from _runtimes(report)
    yield from _network(report)
    if report.daemon:
        yield Finding(Level.HAS, f"a daemon that answers: {report.daemon}")
    else:
        yield Finding(Level.NOTE, f"no daemon answers: {report.no_daemon}")


def _host(report: NodeReport) -> Iterator[Finding]:
    yield Finding(Level.HAS, f"Linux {report.kernel}, cgroup {report.cgroup_version}")
    if not report.root:
        yield Finding(Level.LACKS, "root: Wasm artifacts on the node's network only", "run the daemon as root")
    if not report.overlay:
        yield Finding(Level.LACKS, "overlayfs: no images with layers", "modprobe overlay, and name it in /etc/modules")
    yield from _confinement(report)
    missing = [name for name in _CONTROLLERS if name not in report.controllers]
    if missing:
        hint = "enable them: on the kernel's command line, or in cgroup.subtree_control"
        yield Finding(Level.LACKS, f"cgroup controllers: {', '.join(missing)}", hint)
    if not report.shared_root:
        yield Finding(
            Level.NOTE,
            "/ is no shared mount: volumes cannot be mounted into pods that run (mount propagation)",
            "mount --make-rshared / (systemd does it)",
        )
    if report.free_bytes < _LITTLE_SPACE:
        text = f"room: {report.free_bytes >> 20} MiB are free at {report.root_directory}"
        yield Finding(Level.NOTE, text, "remove images: cri-shim images prune; or set root")


def _confinement(report: NodeReport) -> Iterator[Finding]:
    if not report.seccomp:
        text = "seccomp: no container has a filter of system calls"
        yield Finding(Level.LACKS, text, "a kernel with CONFIG_SECCOMP_FILTER")
    if not report.apparmor:
        text = "no AppArmor: pods that name one of its profiles are refused"
        yield Finding(Level.NOTE, text, "apparmor=1 security=apparmor on the kernel's command line, where it has it")
    if not report.user_namespaces:
        text = "no user namespaces: pods with hostUsers: false are refused"
        yield Finding(Level.NOTE, text, "sysctl -w user.max_user_namespaces=15000")


def _runtimes(report: NodeReport) -> Iterator[Finding]:
    linux = [name for name, (kind, _) in report.handlers.items() if kind is Kind.LINUX]
    for name, (kind, program) in sorted(report.handlers.items()):
        if kind is Kind.WASM and report.wasmtime:
            yield Finding(Level.HAS, f"handler {name}: wasmtime {report.wasmtime}")
        elif kind is Kind.WASM:
            yield Finding(Level.LACKS, f"handler {name}: the wasmtime package", "pip install wasmtime")
        else:
            yield _program(report, f"handler {name}", program)
    if not linux:
        hint = _package("runc")
        yield Finding(Level.NOTE, "no handler for Linux containers: pods without a RuntimeClass run as Wasm", hint)
    else:
        yield _program(report, "the monitor of Linux containers", report.monitor)
        yield _program(report, "the first process of shared PID namespaces", report.infra)


def _network(report: NodeReport) -> Iterator[Finding]:
    if not report.network:
        yield Finding(Level.HAS, "a pod network")
    else:
        hint = (
            f"apt-get install containernetworking-plugins; "
            f"cri-shim doctor --conflist >{report.conf_dir}/10-cri-shim.conflist is a network of this node's own"
        )
        yield Finding(Level.LACKS, f"a pod network, pods can only use the node's: {report.network}", hint)
    if not report.forwarding:
        hint = "sysctl -w net.ipv4.ip_forward=1, and name it in /etc/sysctl.d"
        yield Finding(Level.NOTE, "net.ipv4.ip_forward is off: pods of a bridge reach nothing beyond the node", hint)
    if report.programs.get("iptables") is None:
        yield Finding(Level.NOTE, "no iptables: no host ports, and pods are not masqueraded", _package("iptables"))


def _program(report: NodeReport, what: str, program: str) -> Finding:
    path = report.programs.get(program)
    if path is None:
        return Finding(Level.LACKS, f"{what}: there is no program {program}", _package(program))
    return Finding(Level.HAS, f"{what}: {path}")


def _package(program: str) -> str:
    package = _PACKAGES.get(program.rpartition("/")[2])
    return f"apt-get install {package}" if package else "install it, or change the configuration"


def default_conflist() -> str:
    """A bridge for the pods of one node, as JSON: addresses by host-local, host ports, bandwidth."""
    ranges = [[{"subnet": "10.88.0.0/16"}]]
    ipam = {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "cri-shim0", "isGateway": True, "ipMasq": True, "hairpinMode": True}
    plugins = [
        {**bridge, "ipam": ipam},
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
    ]
    return json.dumps({"cniVersion": "1.0.0", "name": "cri-shim", "plugins": plugins}, indent=2)
