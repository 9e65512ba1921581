"""The real plugins in the private network namespace of the run, and plugins that fail on command."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.adapters import network as module
from cri_shim.adapters.network import Attachment, Network, PortMapping
from cri_shim.kernel import namespaces
from cri_shim.model.errors import DeadlineExceeded, FailedPrecondition, Internal

REAL = Path("/usr/lib/cni")

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not (REAL / "bridge").exists(), reason="needs containernetworking-plugins"),
]


class Node:
    """A node's network: configuration and lease directories below `base`, one bridge."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.conf = base / "net.d"
        self.fake = base / "bin"
        self.leases = base / "leases"
        self.calls = base / "calls"
        for directory in (self.conf, self.fake):
            directory.mkdir()
        self.network = Network([self.conf], [self.fake, REAL])
        # All tests of a run share a network namespace, and some take a pod's plugins away for good.
        self._before = self._rules()
        self.configure()

    def configure(self, *more: dict[str, object], version: str = "1.0.0") -> None:
        ipam = {"type": "host-local", "dataDir": str(self.leases), "ranges": [[{"subnet": "10.213.7.0/24"}]]}
        bridge = {"type": "bridge", "bridge": "crishim0", "isGateway": True, "ipMasq": True, "ipam": ipam}
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        document = {"cniVersion": version, "name": "testnet", "plugins": [bridge, portmap, *more]}
        (self.conf / "10.conflist").write_text(json.dumps(document))

    def plugin(self, name: str, script: str) -> None:
        """A plugin of our own: logs each call as `NAME COMMAND`, then does what the script says; stdin is in $in."""
        program = self.fake / name
        program.write_text(f'#!/bin/sh\nin=$(cat)\necho "{name} $CNI_COMMAND" >> {self.calls}\n{script}\n')
        program.chmod(0o755)

    def held(self) -> dict[str, set[str]]:
        """Everything of a pod that a plugin can leave behind."""
        return {
            "leases": {file.name for file in self.leases.rglob("10.*")},
            "veths": {name for _, name in socket.if_nameindex() if name.startswith("veth")},
            "rules": self._rules() - self._before,
        }

    @staticmethod
    def _rules() -> set[str]:
        rules = subprocess.run(["iptables-save"], capture_output=True, check=True, text=True).stdout.splitlines()
        return {line for line in rules if "10.213.7." in line or "CNI-DN-" in line or "testnet" in line}


NOTHING: dict[str, set[str]] = {"leases": set(), "veths": set(), "rules": set()}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    subprocess.run(["ip", "link", "delete", "crishim0"], capture_output=True, check=False)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Attachment]:
    pins = tmp_path / "ns"
    namespaces.pin_namespaces(pins, net=True, ipc=False, uts=False, hostname="", sysctls={})
    yield Attachment(
        pod_id="ab" * 32,
        netns=pins / "net",
        pod_name="web",
        pod_namespace="default",
        pod_uid="uid",
        port_mappings=(PortMapping("tcp", 80, 18080), PortMapping("tcp", 81, 0)),
    )
    namespaces.unpin(pins)


def serve_once(netns: Path, port: int) -> socket.socket:
    return namespaces.run_in_netns(netns, lambda: socket.create_server(("0.0.0.0", port)))


async def test_pod_is_reachable_and_nothing_is_left_after_del(node: Node, pod: Attachment) -> None:
    assert node.network.status().ready
    result = await node.network.add(pod)
    assert result.ips[0].startswith("10.213.7.")
    with serve_once(pod.netns, 80):
        for address in ((result.ips[0], 80), ("10.213.7.1", 18080)):
            (await asyncio.to_thread(socket.create_connection, address, 5)).close()
    assert all(node.held().values())
    await node.network.delete(pod, result.raw)
    await node.network.delete(pod, result.raw)
    assert node.held() == NOTHING


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0"])
async def test_versions_that_the_plugins_speak(node: Node, pod: Attachment, version: str) -> None:
    node.configure(version=version)
    result = await node.network.add(pod)
    assert len(result.ips) == 1
    await node.network.delete(pod, result.raw)
    assert node.held() == NOTHING


async def test_del_after_the_configuration_is_gone(node: Node, pod: Attachment) -> None:
    result = await node.network.add(pod)
    (node.conf / "10.conflist").unlink()
    await node.network.delete(pod, result.raw)
    assert node.held() == NOTHING


@pytest.mark.parametrize("remains", ["nothing", "plain file"])
async def test_del_after_the_namespace_is_gone(node: Node, pod: Attachment, remains: str) -> None:
    result = await node.network.add(pod)
    namespaces.unpin(pod.netns.parent)
    if remains == "plain file":
        pod.netns.parent.mkdir()
        pod.netns.touch()
    await node.network.delete(pod, result.raw)
    held = node.held()
    assert (held["leases"], held["veths"]) == (set(), set())
    # The bridge plugin finds its masquerade rule by the namespace's addresses; portmap's rules go by the pod's id.
    assert not [line for line in held["rules"] if "CNI-DN-" in line]
    pod.netns.unlink(missing_ok=True)


@pytest.mark.parametrize("cached", [None, b"", b"{damaged"])
async def test_del_without_a_usable_cache_uses_the_configuration_in_force(
    node: Node, pod: Attachment, cached: bytes | None
) -> None:
    await node.network.add(pod)
    await node.network.delete(pod, cached)
    assert node.held() == NOTHING


async def test_del_with_neither_cache_nor_configuration_is_nothing_to_do(node: Node, pod: Attachment) -> None:
    node.configure({"type": "no-such-plugin"})
    await node.network.delete(pod, None)
    (node.conf / "10.conflist").unlink()
    await node.network.delete(pod, None)


async def test_failing_last_plugin_undoes_the_whole_chain(node: Node, pod: Attachment) -> None:
    error = '{"cniVersion": "1.0.0", "code": 11, "msg": "no room", "details": "try later"}'
    node.plugin("last", f"[ $CNI_COMMAND = ADD ] || exit 0\necho '{error}'; exit 1")
    node.configure({"type": "last"})
    with pytest.raises(Internal) as caught:
        await node.network.add(pod)
    assert str(caught.value) == ("CNI plugin last of network testnet failed on ADD: no room: try later (code 11)")
    assert node.calls.read_text().split("\n") == ["last ADD", "last DEL", ""]
    assert node.held() == NOTHING


async def test_failure_of_the_undoing_is_told_and_the_rest_is_undone(node: Node, pod: Attachment) -> None:
    node.plugin("last", "echo oops $CNI_COMMAND >&2; exit 3")
    node.configure({"type": "last"})
    expected = (
        "CNI plugin last of network testnet failed on ADD: oops ADD; detaching it again failed too: "
        "CNI plugin last of network testnet failed on DEL: oops DEL"
    )
    with pytest.raises(Internal, match=f"^{expected}$"):
        await node.network.add(pod)
    assert node.held() == NOTHING


async def test_failing_del_is_told_after_all_plugins_were_called(node: Node, pod: Attachment) -> None:
    node.plugin("last", "[ $CNI_COMMAND = DEL ] && exit 4; printf '%s' \"$in\" | sed 's/.*\"prevResult\"://; s/}$//'")
    node.configure({"type": "last"})
    result = await node.network.add(pod)
    assert len(result.ips) == 1
    with pytest.raises(Internal, match=r"^CNI plugin last of network testnet failed on DEL: exit code 4$"):
        await node.network.delete(pod, result.raw)
    assert node.held() == NOTHING


@pytest.mark.parametrize("printed", ["", "not json", "[]", '{"ips": [{"address": "300.1.1.1/8"}]}'])
async def test_plugin_that_prints_rubbish(node: Node, pod: Attachment, printed: str) -> None:
    node.plugin("last", f"echo '{printed}'")
    node.configure({"type": "last"})
    with pytest.raises(Internal, match=r"^CNI network testnet: result of CNI plugin last"):
        await node.network.add(pod)
    assert node.held() == NOTHING


async def test_network_without_an_address_is_an_error(node: Node, pod: Attachment) -> None:
    node.plugin("last", 'echo "{}"')
    node.configure({"type": "last"})
    with pytest.raises(FailedPrecondition, match="gave the pod no address; its configuration needs an ipam section"):
        await node.network.add(pod)
    assert node.held() == NOTHING


async def test_plugin_that_hangs_is_killed_and_named(
    node: Node, pod: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PLUGIN_SECONDS", 2.0)
    node.plugin("last", "[ $CNI_COMMAND = DEL ] || sleep 60")
    node.configure({"type": "last"})
    with pytest.raises(DeadlineExceeded, match=r"^CNI plugin last of network testnet failed on ADD: .* did not finish"):
        await node.network.add(pod)
    assert node.held() == NOTHING


async def test_missing_plugin_is_named_before_any_is_called(node: Node, pod: Attachment) -> None:
    node.plugin("first", "exit 1")
    node.configure({"type": "first"}, {"type": "no-such-plugin"})
    assert node.network.status().message.startswith("CNI plugin no-such-plugin is not in ")
    with pytest.raises(FailedPrecondition, match=r"^CNI plugin no-such-plugin is not in .*; install it"):
        await node.network.add(pod)
    assert not node.calls.exists()
    assert node.held() == NOTHING


async def test_many_pods_at_once_get_different_addresses(node: Node, tmp_path: Path) -> None:
    pods = []
    for number in range(8):
        pins = tmp_path / f"ns{number}"
        namespaces.pin_namespaces(pins, net=True, ipc=False, uts=False, hostname="", sysctls={})
        pods.append(Attachment(f"{number:064x}", pins / "net", f"pod{number}", "default", "uid"))
    try:
        results = await asyncio.gather(*(node.network.add(pod) for pod in pods))
        assert len({result.ips[0] for result in results}) == len(pods)
        await asyncio.gather(*(node.network.delete(p, r.raw) for p, r in zip(pods, results, strict=True)))
    finally:
        for pod in pods:
            namespaces.unpin(pod.netns.parent)
    assert node.held() == NOTHING


async def test_cancelled_add_can_be_deleted_without_a_cache(node: Node, pod: Attachment) -> None:
    node.plugin("last", "[ $CNI_COMMAND = DEL ] || sleep 60")
    node.configure({"type": "last"})
    task = asyncio.create_task(node.network.add(pod))
    async with asyncio.timeout(60):
        while not node.calls.exists():
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await node.network.delete(pod, None)
    assert node.held() == NOTHING


async def test_plugins_do_not_get_the_service_managers_socket(
    node: Node, pod: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    node.plugin("last", f"env > {node.base}/env; exit 1")
    node.configure({"type": "last"})
    with pytest.raises(Internal):
        await node.network.add(dataclasses.replace(pod, pod_name="other"))
    seen = (node.base / "env").read_text()
    assert "NOTIFY_SOCKET" not in seen
    assert f"PATH={os.environ['PATH']}\n" in seen
    assert "K8S_POD_NAME=other" in seen
