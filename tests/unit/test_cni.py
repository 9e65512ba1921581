"""CNI documents, and the status of a network; none of it needs root."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_shim.adapters.network import Network
from cri_shim.model.errors import InvalidArgument
from cri_shim.wire import cni

BRIDGE = {"type": "bridge", "bridge": "cni0", "ipam": {"type": "host-local"}}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True, "bandwidth": False}}
LIST = {"cniVersion": "1.0.0", "name": "podnet", "plugins": [BRIDGE, PORTMAP]}
RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [
        {"name": "cni0", "mac": "02:00:00:00:00:01"},
        {"name": "veth1"},
        {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/ns/net"},
    ],
    "ips": [
        {"address": "fd00::5/64", "interface": 2},
        {"address": "10.88.0.5/16", "gateway": "10.88.0.1", "interface": 2},
        {"address": "10.88.0.1/16", "interface": 0},
    ],
    "dns": {},
}
POD = cni.Attachment(
    pod_id="a" * 64,
    netns=Path("/run/ns/net"),
    pod_name="web",
    pod_namespace="default",
    pod_uid="1-2-3",
    port_mappings=(cni.PortMapping("tcp", 80, 8080, "127.0.0.1"), cni.PortMapping("udp", 53, 0)),
    ingress_bandwidth=1_000_000,
    cgroup_path="/kubepods/pod1",
    dns_servers=("10.0.0.10",),
    annotations={"a": "b"},
)
ALL = dict.fromkeys(("portMappings", "bandwidth", "dns", "cgroupPath", "io.kubernetes.cri.pod-annotations"), True)


def parse(document: object) -> cni.NetworkConfig:
    return cni.parse_network(json.dumps(document).encode(), "10-x.conflist")


def request(plugin: Mapping[str, object], attachment: cni.Attachment = POD) -> Any:
    network = parse({"cniVersion": "1.1.0", "name": "podnet", "plugins": [plugin]})
    return json.loads(cni.stdin_for_add(network, network.plugins[0], attachment, None))


def test_list_is_read_in_order() -> None:
    network = parse(LIST)
    assert (network.name, network.version) == ("podnet", "1.0.0")
    assert [plugin.type for plugin in network.plugins] == ["bridge", "portmap"]
    assert network.plugins[1].capabilities == {"portMappings"}


def test_single_plugin_is_a_list_of_one() -> None:
    network = parse(BRIDGE | {"cniVersion": "0.3.1", "name": "one"})
    assert (network.name, network.version, len(network.plugins)) == ("one", "0.3.1", 1)


def test_highest_known_of_several_versions_is_taken() -> None:
    network = parse({"cniVersions": ["0.3.1", "1.1.0", "9.0.0", "0.4.0"], "name": "x", "plugins": [BRIDGE]})
    assert network.version == "1.1.0"


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", "Object missing required field `type`"),
        (b'{"plugins": []}', "Object missing required field `name`"),
        (b'{"name": "x", "plugins": []}', "cniVersion '' is not supported, only 0.3.0, 0.3.1"),
        (b'{"cniVersion": "0.2.0", "name": "x", "plugins": []}', "cniVersion '0.2.0' is not supported"),
        (b'{"cniVersion": "1.0.0", "name": "x", "plugins": []}', "plugins is empty"),
        (b'{"cniVersion": "1.0.0", "name": "x", "plugins": [{}]}', "missing required field `type`"),
        (
            b'{"cniVersion": "1.0.0", "name": "x", "plugins": {"type": "bridge"}}',
            r"Expected `array`, got `object` - at",
        ),
        (b'{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": 7}]}', r"Expected `str`, got `int` - at `\$"),
        (b'{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "../sh"}]}', "type '../sh' is not the name of a"),
        (b'{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "a\\u0000b"}]}', "is not the name of a plugin"),
        (b'{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": ".."}]}', "is not the name of a plugin"),
        (b'{"cniVersion": "1.0.0", "name": "a/b", "plugins": [{"type": "x"}]}', "name 'a/b' is not a network name"),
        (b'{"cniVersion": "1.0.0", "name": 5, "plugins": [{"type": "x"}]}', "Expected `str`, got `int`"),
    ],
)
def test_bad_configuration_is_refused_with_file_and_reason(document: bytes, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^CNI configuration 10-x\.conflist.* ?{reason}"):
        cni.parse_network(document, "10-x.conflist")


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_json_is_parsed_or_refused(document: object) -> None:
    data = json.dumps(document).encode()
    for parser in (cni.parse_network, cni.parse_result):
        with contextlib.suppress(InvalidArgument):
            parser(data, "x")
    with contextlib.suppress(InvalidArgument):
        cni.parse_cached(data)
    cni.parse_error(data)


def test_plugin_gets_only_the_capabilities_that_it_declares() -> None:
    assert "runtimeConfig" not in request(BRIDGE)
    assert request(PORTMAP)["runtimeConfig"] == {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}]
    }


def test_all_capabilities() -> None:
    assert request({"type": "all", "capabilities": ALL})["runtimeConfig"] == {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}],
        "bandwidth": {"ingressRate": 1_000_000, "ingressBurst": 2**31 - 1},
        "dns": {"servers": ["10.0.0.10"]},
        "cgroupPath": "/kubepods/pod1",
        "io.kubernetes.cri.pod-annotations": {"a": "b"},
    }


def test_nothing_to_say_is_not_said() -> None:
    bare = cni.Attachment("b" * 64, Path("/x"), "n", "ns", "u")
    assert "runtimeConfig" not in request({"type": "all", "capabilities": ALL}, bare)


def test_chain_passes_results_on() -> None:
    network = parse(LIST)
    seen = json.loads(cni.stdin_for_add(network, network.plugins[1], POD, RESULT))
    assert (seen["name"], seen["cniVersion"], seen["prevResult"]) == ("podnet", "1.0.0", RESULT)
    assert "prevResult" not in LIST["plugins"][1]


@pytest.mark.parametrize(("version", "given"), [("0.3.1", False), ("0.4.0", True), ("1.1.0", True)])
def test_result_is_given_on_del_from_0_4_0_on(version: str, given: bool) -> None:
    network = parse(LIST | {"cniVersion": version})
    assert ("prevResult" in json.loads(cni.stdin_for_del(network, network.plugins[0], POD, RESULT))) is given


def test_environment() -> None:
    assert cni.environment(cni.Verb.ADD, POD, "/run/ns/net", [Path("/opt/cni/bin"), Path("/usr/lib/cni")]) == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "a" * 64,
        "CNI_NETNS": "/run/ns/net",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin:/usr/lib/cni",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;"
        f"K8S_POD_INFRA_CONTAINER_ID={'a' * 64};K8S_POD_UID=1-2-3",
    }


def test_names_cannot_add_arguments() -> None:
    hostile = cni.Attachment("b" * 64, Path("/x"), "n;IgnoreUnknown=0", "ns\0", "u")
    words = cni.environment(cni.Verb.ADD, hostile, "", [])["CNI_ARGS"].split(";")
    assert words == ["IgnoreUnknown=1", f"K8S_POD_INFRA_CONTAINER_ID={'b' * 64}", "K8S_POD_UID=u"]


def test_addresses_of_the_sandbox_ipv4_first() -> None:
    assert cni.addresses_of(RESULT) == ("10.88.0.5", "fd00::5")


@pytest.mark.parametrize(
    ("result", "addresses"),
    [
        ({}, ()),
        ({"ips": [{"version": "4", "address": "10.0.0.2/24"}]}, ("10.0.0.2",)),
        ({"interfaces": [{"name": "eth0"}], "ips": [{"address": "10.0.0.2/24", "interface": 0}]}, ()),
        ({"interfaces": [], "ips": [{"address": "10.0.0.2/24", "interface": 7}]}, ()),
        ({"ips": [{"address": "fe80::1/128"}, {"address": "1.2.3.4/32"}]}, ("1.2.3.4", "fe80::1")),
    ],
)
def test_addresses_of_odd_results(result: dict[str, object], addresses: tuple[str, ...]) -> None:
    assert cni.addresses_of(result) == addresses


@pytest.mark.parametrize(
    "printed",
    [b"", b"null", b'{"ips": 4}', b'{"ips": [{"address": "10.0.0.300/24"}]}', b'{"ips": [{}]}', b'{"interfaces": [1]}'],
)
def test_broken_result_names_the_plugin(printed: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"^result of CNI plugin bridge"):
        cni.parse_result(printed, "bridge")


def test_error_of_a_plugin() -> None:
    told = cni.parse_error(b'{"cniVersion": "1.0.0", "code": 7, "msg": "bad", "details": "worse"}')
    assert told is not None
    assert told.text() == "bad: worse (code 7)"
    assert cni.PluginError(7, "bad", "").text() == "bad (code 7)"
    assert cni.parse_error(b"panic: oh no") is None
    assert cni.parse_error(b'{"code": "seven"}') is None


def test_cache_holds_all_that_del_needs() -> None:
    network = parse(LIST)
    assert cni.parse_cached(cni.format_cached(network, RESULT)) == (network, RESULT)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"network": {}, "result": {}}', b'{"network": 1, "result": 2}'])
def test_damaged_cache_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"^cached CNI result"):
        cni.parse_cached(data)


class TestStatus:
    """What Network.status says while files come and go."""

    @pytest.fixture
    def dirs(self, tmp_path: Path) -> tuple[Path, Path]:
        conf, programs = tmp_path / "net.d", tmp_path / "bin"
        conf.mkdir()
        programs.mkdir()
        for name in ("bridge", "portmap"):
            (programs / name).write_text("#!/bin/sh\n")
            (programs / name).chmod(0o755)
        return conf, programs

    def test_follows_the_directory_without_a_restart(self, dirs: tuple[Path, Path], tmp_path: Path) -> None:
        conf, programs = dirs
        network = Network([tmp_path / "none", conf], [tmp_path / "nobin", programs])
        empty = network.status()
        assert (empty.ready, empty.reason) == (False, "NetworkPluginNotReady")
        assert empty.message == (
            f"no readable CNI configuration in {tmp_path}/none, {conf}; put a .conflist file there"
        )
        file = conf / "10-net.conflist"
        file.write_text(json.dumps(LIST))
        assert network.status() == network.status()
        assert network.status().ready
        (conf / "05-first.conf").write_text("{")
        assert network.status().message.startswith(f"CNI configuration {conf}/05-first.conf is not JSON")
        (conf / "05-first.conf").unlink()
        assert network.status().ready
        (programs / "portmap").chmod(0o644)
        assert network.status().message.startswith(
            f"CNI plugin portmap is not in {tmp_path}/nobin, {programs}; install"
        )
        (programs / "portmap").chmod(0o755)
        file.unlink()
        assert not network.status().ready

    def test_earlier_directory_wins(self, dirs: tuple[Path, Path], tmp_path: Path) -> None:
        conf, programs = dirs
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "99.conflist").write_text("{}")
        (conf / "10.conflist").write_text(json.dumps(LIST))
        assert "first/99.conflist" in Network([tmp_path / "first", conf], [programs]).status().message

    def test_other_suffixes_and_dangling_links_are_not_read(self, dirs: tuple[Path, Path]) -> None:
        conf, programs = dirs
        (conf / "00-old.conflist.bak").write_text("{")
        (conf / "00-gone.conflist").symlink_to("nowhere")
        (conf / "10.conflist").write_text(json.dumps(LIST))
        assert Network([conf], [programs]).status().ready

    @pytest.mark.parametrize("kind", ["fifo", "directory", "large"])
    def test_what_is_no_plain_small_file_is_refused(self, dirs: tuple[Path, Path], kind: str) -> None:
        conf, programs = dirs
        file = conf / "10.conflist"
        match kind:
            case "fifo":
                os.mkfifo(file)
            case "directory":
                file.mkdir()
            case _:
                file.write_text(json.dumps(LIST) + " " * (1 << 20))
        message = Network([conf], [programs]).status().message
        assert message.startswith(f"CNI configuration {file} is ") or "Is a directory" in message

    def test_same_size_rewrite_is_seen(self, dirs: tuple[Path, Path]) -> None:
        conf, programs = dirs
        network = Network([conf], [programs])
        for name in ("aaa", "bbb"):
            (conf / "new").write_text(json.dumps(LIST | {"plugins": [{"type": name}]}))
            (conf / "new").rename(conf / "10.conflist")
            assert f"CNI plugin {name} " in network.status().message

    def test_costs_less_than_a_millisecond(self, dirs: tuple[Path, Path]) -> None:
        conf, programs = dirs
        (conf / "10.conflist").write_text(json.dumps(LIST))
        network = Network([conf], [programs])
        network.status()
        best = min(_timed(network) for _ in range(50))
        assert best < 0.001


def _timed(network: Network) -> float:
    started = time.perf_counter()
    network.status()
    return time.perf_counter() - started


@pytest.mark.parametrize(
    ("more", "verbs"),
    [
        ({"cniVersion": "0.3.1"}, set()),
        ({"cniVersion": "0.4.0"}, {"CHECK"}),
        ({"cniVersion": "0.4.0", "disableCheck": "true"}, set()),
        ({"cniVersion": "1.0.0", "disableCheck": False}, {"CHECK"}),
        ({"cniVersion": "1.1.0"}, {"CHECK", "STATUS", "GC"}),
        ({"cniVersion": "1.1.0", "disableCheck": True, "disableGC": True}, {"STATUS"}),
    ],
)
def test_verbs_that_a_network_has(more: dict[str, object], verbs: set[str]) -> None:
    document = {"name": "n", "plugins": [{"type": "bridge"}], **more}
    network = cni.parse_network(msgspec.json.encode(document), "file")
    asked = {cni.Verb.CHECK, cni.Verb.STATUS, cni.Verb.GC}
    assert {verb.value for verb in asked if network.has(verb)} == verbs
    cached, _ = cni.parse_cached(cni.format_cached(network, {}))
    assert cached.has(cni.Verb.CHECK) == network.has(cni.Verb.CHECK)


def test_what_is_asked_of_no_pod_names_the_network_and_nothing_else() -> None:
    document = {"cniVersion": "1.1.0", "name": "n", "plugins": [{"type": "t", "capabilities": {"bandwidth": True}}]}
    network = cni.parse_network(msgspec.json.encode(document), "file")
    (plugin,) = network.plugins
    base = {"type": "t", "capabilities": {"bandwidth": True}, "name": "n", "cniVersion": "1.1.0"}
    assert msgspec.json.decode(cni.stdin_for_status(network, plugin)) == base
    valid = [{"containerID": "aa", "ifname": "eth0"}]
    assert msgspec.json.decode(cni.stdin_for_gc(network, plugin, ["aa"])) == {
        **base,
        "cni.dev/valid-attachments": valid,
        "cni.dev/attachments": valid,
    }
    assert cni.network_environment(cni.Verb.GC, [Path("/a"), Path("/b")]) == {"CNI_COMMAND": "GC", "CNI_PATH": "/a:/b"}
