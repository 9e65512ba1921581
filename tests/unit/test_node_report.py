"""What a node lacks, and how to get it: one thing at a time, and nothing on a node that has it all."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from cri_shim.model.handler import Kind
from cri_shim.spec.node_report import Level, NodeReport, default_conflist, findings
from cri_shim.wire.cni import parse_network

WHOLE = NodeReport(
    kernel="6.1.0",
    root=True,
    overlay=True,
    shared_root=True,
    cgroup_version="v2",
    controllers=frozenset({"cpu", "memory", "pids", "cpuset", "io"}),
    seccomp=True,
    apparmor=True,
    user_namespaces=True,
    forwarding=True,
    free_bytes=1 << 40,
    root_directory="/var/lib/cri-shim",
    handlers={"runc": (Kind.LINUX, "runc"), "wasm": (Kind.WASM, "")},
    monitor="conmon",
    infra="catatonit",
    programs={name: f"/usr/bin/{name}" for name in ("runc", "conmon", "catatonit", "iptables")},
    network="",
    conf_dir="/etc/cni/net.d",
    wasmtime="50.0.1",
    daemon="cri-shim 0.1.0",
    no_daemon="",
)


def test_a_whole_node_lacks_nothing() -> None:
    assert {finding.level for finding in findings(WHOLE)} == {Level.HAS}


@pytest.mark.parametrize(
    ("changed", "level", "text", "hint"),
    [
        ({"root": False}, Level.LACKS, "root", "run the daemon as root"),
        ({"seccomp": False}, Level.LACKS, "seccomp", "CONFIG_SECCOMP_FILTER"),
        ({"apparmor": False}, Level.NOTE, "no AppArmor", "security=apparmor"),
        ({"user_namespaces": False}, Level.NOTE, "hostUsers: false", "max_user_namespaces"),
        ({"overlay": False}, Level.LACKS, "overlayfs", "modprobe overlay"),
        ({"controllers": frozenset({"cpu"})}, Level.LACKS, "controllers: memory, pids, cpuset", "enable them"),
        ({"shared_root": False}, Level.NOTE, "no shared mount", "make-rshared"),
        ({"free_bytes": 5 << 20}, Level.NOTE, "5 MiB are free at /var/lib/cri-shim", "images prune"),
        ({"programs": {**WHOLE.programs, "runc": None}}, Level.LACKS, "no program runc", "apt-get install runc"),
        ({"programs": {**WHOLE.programs, "conmon": None}}, Level.LACKS, "no program conmon", "apt-get install conmon"),
        ({"programs": {**WHOLE.programs, "iptables": None}}, Level.NOTE, "no host ports", "apt-get install iptables"),
        ({"handlers": {"wasm": (Kind.WASM, "")}}, Level.NOTE, "no handler for Linux", "apt-get install runc"),
        ({"handlers": {**WHOLE.handlers, "kata": (Kind.LINUX, "/opt/kata")}}, Level.LACKS, "/opt/kata", "install it"),
        ({"wasmtime": ""}, Level.LACKS, "wasmtime", "pip install wasmtime"),
        ({"network": "no conflist"}, Level.LACKS, "no conflist", "doctor --conflist >/etc/cni/net.d/"),
        ({"forwarding": False}, Level.NOTE, "ip_forward", "sysctl -w"),
        ({"daemon": "", "no_daemon": "gone"}, Level.NOTE, "no daemon answers: gone", ""),
    ],
)
def test_what_is_lacking_comes_with_a_way_to_get_it(
    changed: dict[str, Any], level: Level, text: str, hint: str
) -> None:
    (found,) = [each for each in findings(dataclasses.replace(WHOLE, **changed)) if each.level is not Level.HAS]
    assert found.level is level
    assert text in found.text
    assert hint in found.hint


def test_the_offered_network_is_one() -> None:
    network = parse_network(default_conflist().encode(), "offered")
    assert [plugin.type for plugin in network.plugins] == ["bridge", "portmap", "bandwidth"]
    assert json.loads(default_conflist())["name"] == "cri-shim"
