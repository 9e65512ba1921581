"""What the configuration of an OCI handler may say, and what becomes of it in a container."""

from __future__ import annotations

import dataclasses

import pytest

from cri_shim import config
from cri_shim.model.errors import InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import container
from cri_shim.spec.ulimits import parse_ulimits
from handlers.oci.options import OciOptions
from tests.unit.test_spec_container import FOUND, HOST, build, plan, with_security

UNLIMITED = 2**64 - 1


def test_ulimits() -> None:
    assert parse_ulimits(["nofile=1024:4096", "core=0", "memlock=unlimited", "nproc=5:-1", "core=7"]) == (
        {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 4096},
        {"type": "RLIMIT_CORE", "soft": 7, "hard": 7},
        {"type": "RLIMIT_MEMLOCK", "soft": UNLIMITED, "hard": UNLIMITED},
        {"type": "RLIMIT_NPROC", "soft": 5, "hard": UNLIMITED},
    )


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("default_ulimits: [files=1]", "default_ulimits: 'files=1' does not begin with one of as, core"),
        ("default_ulimits: [nofile=x]", "default_ulimits: 'nofile=x' is not of the form"),
        ("default_ulimits: [nofile]", "default_ulimits: 'nofile' is not of the form"),
        ("default_ulimits: ['nofile=2:1']", "default_ulimits: the soft limit of 'nofile=2:1' is above"),
        ("default_capabilities: [CAP_CHOWN]", "default_capabilities: Linux has no capability 'CAP_CHOWN'"),
        ("default_env: {'A=B': x}", "default_env: 'A=B' cannot be"),
        ("default_sysctls: {kernel.panic: '1'}", "default_sysctls: kernel.panic is not namespaced"),
        ("default_sysctls: {net..x: '1'}", "default_sysctls: 'net..x' is not the name"),
        ("default_sysctls: {net.core.somaxconn: 1}", "expected `str`, got `int`"),
        ("privileged_without_host_devices_all_devices_allowed: true", "needs privileged_without_host_devices"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(option: str, words: str) -> None:
    text = f"handlers:\n  mine:\n    kind: oci\n    path: runc\n    {option}\n"
    loaded, origins = config.load_text([("c.yaml", text)])
    with pytest.raises(InvalidArgument, match=rf"c.yaml:[25]: handlers\.mine.*{words}"):
        config.decode(loaded.handlers["mine"], OciOptions, origins, ("handlers", "mine"))


def test_default_capabilities() -> None:
    host = dataclasses.replace(HOST, default_capabilities=frozenset({"CHOWN", "KILL"}))

    def given(**asked: list[str]) -> set[str]:
        config = with_security(capabilities=pb.Capability(**asked))
        return set(build(config, host)["process"]["capabilities"]["bounding"])

    assert given() == {"CAP_CHOWN", "CAP_KILL"}
    assert given(add_capabilities=["NET_RAW"], drop_capabilities=["KILL"]) == {"CAP_CHOWN", "CAP_NET_RAW"}


def test_rlimits_are_of_containers_and_not_of_the_infra_container() -> None:
    host = dataclasses.replace(HOST, rlimits=parse_ulimits(["nofile=10"]))
    assert build(host=host)["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 10}]
    assert "rlimits" not in build()["process"]
    assert "rlimits" not in container.build(dataclasses.replace(plan(), infra=True), host, FOUND)["process"]


def test_a_privileged_container_without_devices_is_denied_all_of_them() -> None:
    host = dataclasses.replace(HOST, privileged_any_device=False)
    config = with_security(privileged=True)
    config.devices.add(host_path="/dev/null", permissions="r")
    rules = build(config, host)["linux"]["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert rules[1]["allow"]
    assert build(config)["linux"]["resources"]["devices"][0] == {"allow": True, "access": "rwm"}
