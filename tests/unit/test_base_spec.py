"""A base spec adds to a container and changes nothing of what was asked for."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from cri_shim.spec import container
from cri_shim.spec.base_spec import parse_base
from cri_shim.spec.facts import Json
from cri_shim.spec.ulimits import parse_ulimits
from tests.unit.test_spec_container import FOUND, HOST, build, mounted, plan, with_security


def on(base: dict[str, Any], **host: Any) -> Json:
    parsed = parse_base(json.dumps(base).encode())
    return build(host=dataclasses.replace(HOST, base_spec=parsed, **host))


def test_what_the_cri_has_a_field_for_is_the_requests() -> None:
    base = {
        "ociVersion": "9.9",
        "hostname": "base",
        "root": {"path": "/base", "readonly": True},
        "process": {
            "args": ["base"],
            "cwd": "/base",
            "user": {"uid": 99},
            "terminal": True,
            "capabilities": {"bounding": ["CAP_SYS_ADMIN"], "ambient": ["CAP_SYS_ADMIN"]},
            "noNewPrivileges": True,
            "apparmorProfile": "base",
            "selinuxLabel": "base",
            "oomScoreAdj": -900,
        },
        "linux": {
            "namespaces": [],
            "cgroupsPath": "/base",
            "maskedPaths": ["/base"],
            "readonlyPaths": ["/base"],
            "seccomp": {"defaultAction": "SCMP_ACT_KILL"},
            "resources": {"memory": {"limit": 1}, "cpu": {"shares": 3}, "unified": {"a": "b"}},
            "rootfsPropagation": "shared",
            "uidMappings": [{}],
        },
    }
    assert on(base) == build()


def test_what_it_adds() -> None:
    base = {
        "process": {
            "env": ["BASE=1", "A=base"],
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 1}, {"type": "RLIMIT_CORE", "soft": 2, "hard": 2}],
            "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 4},
        },
        "annotations": {"base": "1", "io.kubernetes.cri.sandbox-id": "base"},
        "mounts": [{"destination": "/proc", "source": "base"}, {"destination": "/opt/base", "type": "tmpfs"}],
        "hooks": {"poststop": [{"path": "/base"}]},
        "linux": {
            "sysctl": {"net.core.somaxconn": "1"},
            "devices": [{"path": "/dev/base", "type": "c", "major": 1, "minor": 3}],
            "resources": {
                "blockIO": {"weight": 100},
                "pids": {"limit": 50},
                "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "access": "r"}],
            },
            "personality": {"domain": "LINUX32"},
        },
    }
    spec = on(base, rlimits=parse_ulimits(["nofile=10"]))
    process, linux = spec["process"], spec["linux"]
    assert process["env"] == ["BASE=1", "A=1"]
    assert [(limit["type"], limit["soft"]) for limit in process["rlimits"]] == [
        ("RLIMIT_CORE", 2),
        ("RLIMIT_NOFILE", 10),
    ]
    assert process["ioPriority"]["priority"] == 4
    assert spec["annotations"]["base"] == "1"
    assert spec["annotations"]["io.kubernetes.cri.sandbox-id"] == "p" * 64
    assert mounted(spec, "/proc")["source"] == "proc"
    assert mounted(spec, "/opt/base")["type"] == "tmpfs"
    assert spec["hooks"] == {"poststop": [{"path": "/base"}]}
    assert linux["sysctl"] == {"net.core.somaxconn": "1"}
    assert [device["path"] for device in linux["devices"]] == ["/dev/base"]
    assert linux["resources"] == {
        "blockIO": {"weight": 100},
        "pids": {"limit": 50},
        "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "access": "r"}],
    }
    assert linux["personality"] == {"domain": "LINUX32"}


def test_parents_are_mounted_before_what_is_below_them() -> None:
    base = {"mounts": [{"destination": "/etc", "type": "tmpfs"}, {"destination": "/dev/shm/deep", "type": "tmpfs"}]}
    targets = [mount["destination"] for mount in on(base)["mounts"]]
    assert targets.index("/etc") < targets.index("/etc/hosts")
    assert targets.index("/dev") < targets.index("/dev/shm") < targets.index("/dev/shm/deep")


def test_an_infra_container_gets_nothing_of_it() -> None:
    host = dataclasses.replace(HOST, base_spec={"annotations": {"base": "1"}})
    made = dataclasses.replace(plan(with_security()), infra=True)
    assert "base" not in container.build(made, host, FOUND)["annotations"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "Expected `object`"),
        ("{", "truncated"),
        ('{"mounts": {}}', "Expected `array`"),
        ('{"mounts": [{}]}', "missing required field `destination`"),
        ('{"process": {"env": [1]}}', "Expected `str`"),
        ('{"process": {"rlimits": [{}]}}', "`type`"),
        ('{"linux": null}', "Expected `object`"),
        ('{"linux": {"devices": [{}]}}', "`path`"),
        ('{"hooks": {"later": []}}', "there is no stage 'later'"),
    ],
)
def test_what_cannot_be_merged_is_an_error(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_base(text.encode())
