"""Networks of pods by real CNI plugins: who reaches whom, and what the node says when there is no network.

Not the conversation with plugins (`tests/kernel/test_cni.py`). The node is the network namespace of the test run.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from cri_shim.kernel import namespaces
from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support.cri import Pod
from tests.support.expect import eventually, refused

pytestmark = pytest.mark.root

NODE_ADDRESS = "192.0.2.53"


def serve(lab: Lab, pod: Pod, text: str, *, port: int = 80) -> str:
    """A container that answers HTTP requests with a text; it listens when this returns."""
    script = f"mkdir /www && echo {text} >/www/index.html && exec httpd -f -p {port} -h /www"
    container = lab.cri.run(pod, lab.shell(script, name=f"serve-{port}"))
    probe = f"netstat -ltn | grep -q ':{port} '"
    eventually(lambda: lab.cri.exec(container, ["sh", "-c", probe]).exit_code == 0)
    return container


def fetch(address: str, port: int = 80) -> str:
    """What the server answers to the node."""
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/index.html")
        return connection.getresponse().read().decode().strip()
    finally:
        connection.close()


def fetch_inside(lab: Lab, container: str, address: str, port: int = 80) -> str:
    """What it answers to a process in a container. Not by wget: Debian's static busybox cannot look up names."""
    script = f"printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {address} {port}"
    answer = lab.cri.exec(container, ["sh", "-c", script])
    assert answer.exit_code == 0, answer.stderr
    return answer.stdout.decode().strip().rpartition("\n")[2]


def addresses_of(lab: Lab, pod: Pod) -> list[str]:
    network = lab.cri.pod_status(pod).network
    return [network.ip, *(more.ip for more in network.additional_ips)]


@contextmanager
def node_address() -> Iterator[str]:
    """An address of the node that is not its loopback."""
    subprocess.run(["ip", "address", "add", f"{NODE_ADDRESS}/32", "dev", "lo"], check=True)
    try:
        yield NODE_ADDRESS
    finally:
        subprocess.run(["ip", "address", "del", f"{NODE_ADDRESS}/32", "dev", "lo"], check=True)


def shown_addresses(link: str) -> str:
    return subprocess.run(
        ["ip", "-6", "address", "show", "dev", link], capture_output=True, text=True, check=True
    ).stdout


def network_condition(lab: Lab) -> pb.RuntimeCondition:
    conditions = lab.cri.runtime.Status(pb.StatusRequest()).status.conditions
    assert all(condition.status for condition in conditions if condition.type == "RuntimeReady")
    return next(condition for condition in conditions if condition.type == "NetworkReady")


def test_pods_and_node_reach_each_other(lab: Lab) -> None:
    one, two = lab.pod("runc", network=pb.POD), lab.pod("crun", network=pb.POD)
    (first,), (second,) = addresses_of(lab, one), addresses_of(lab, two)
    assert first != second
    server, other = serve(lab, one, "one"), serve(lab, two, "two")
    assert (fetch(first), fetch(second)) == ("one", "two")
    assert fetch_inside(lab, server, second) == "two"
    assert fetch_inside(lab, other, first) == "one"
    assert fetch_inside(lab, server, "127.0.0.1") == "one"
    # Containers of one pod share addresses and ports, those of two pods do not.
    neighbour = serve(lab, one, "neighbour", port=81)
    assert fetch_inside(lab, neighbour, "127.0.0.1") == "one"
    assert fetch(first, 81) == "neighbour"
    shown = lab.cri.exec(neighbour, ["ip", "-4", "-o", "address"]).stdout.decode()
    assert {line.split()[1] for line in shown.splitlines()} == {"lo", "eth0"}
    assert f"{first}/" in shown
    assert b"default via" in lab.cri.exec(neighbour, ["ip", "route"]).stdout


def test_host_ports(lab: Lab) -> None:
    config = lab.pod_config(network=pb.POD)
    config.port_mappings.add(protocol=pb.TCP, container_port=80, host_port=18080)
    config.port_mappings.add(protocol=pb.TCP, container_port=81, host_port=18081, host_ip=NODE_ADDRESS)
    config.port_mappings.add(protocol=pb.TCP, container_port=82, host_port=0)
    with node_address() as address:
        pod = lab.pod("crun", config=config)
        serve(lab, pod, "mapped")
        serve(lab, pod, "one address", port=81)
        assert fetch("127.0.0.1", 18080) == "mapped"
        assert fetch(address, 18080) == "mapped"
        assert fetch(address, 18081) == "one address"
        with pytest.raises(ConnectionRefusedError):
            fetch("127.0.0.1", 18081)
        # From another pod too, by the node's address.
        client = lab.cri.run(lab.pod("crun", network=pb.POD), lab.shell("exec sleep 1000"))
        assert fetch_inside(lab, client, address, 18080) == "mapped"
        lab.cri.stop_pod(pod)
        with pytest.raises(ConnectionRefusedError):
            fetch("127.0.0.1", 18080)


def test_host_ports_of_other_protocols(lab: Lab) -> None:
    """SCTP only as far as the packet filter: hardly any kernel has it loaded."""
    config = lab.pod_config(network=pb.POD)
    config.port_mappings.add(protocol=pb.UDP, container_port=5353, host_port=18053, host_ip=NODE_ADDRESS)
    config.port_mappings.add(protocol=pb.SCTP, container_port=5354, host_port=18054, host_ip=NODE_ADDRESS)
    with node_address() as address:
        pod = lab.pod("crun", config=config)
        (inside,) = addresses_of(lab, pod)
        netns = lab.daemon.state / "pods" / pod.id / "ns" / "net"
        with (
            namespaces.run_in_netns(netns, lambda: socket.socket(type=socket.SOCK_DGRAM)) as server,
            socket.socket(type=socket.SOCK_DGRAM) as client,
        ):
            for end in (server, client):
                end.settimeout(5)
            server.bind(("", 5353))
            client.sendto(b"ping", (address, 18053))
            data, sender = server.recvfrom(100)
            server.sendto(b"pong", sender)
            assert (data, client.recvfrom(100)) == (b"ping", (b"pong", (address, 18053)))
        mapped = f"-d {address}/32 -p sctp -m sctp --dport 18054 -j DNAT --to-destination {inside}:5354"
        assert any(rule.endswith(mapped) for rule in nat_rules())
        lab.cri.stop_pod(pod)
        assert not [rule for rule in nat_rules() if "1805" in rule]


def nat_rules() -> list[str]:
    return subprocess.run(
        ["iptables-save", "-t", "nat"], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_bandwidth(lab: Lab) -> None:
    """Both directions are shaped outside of the pod, where it cannot change that."""
    file = lab.daemon.cni / "10-pods.conflist"
    network = json.loads(file.read_text())
    network["plugins"].append({"type": "bandwidth", "capabilities": {"bandwidth": True}})
    file.write_text(json.dumps(network))
    before = shaped_rates()
    free = lab.pod("crun", network=pb.POD)
    assert shaped_rates() == before
    config = lab.pod_config(network=pb.POD)
    config.annotations["kubernetes.io/ingress-bandwidth"] = "4M"
    config.annotations["kubernetes.io/egress-bandwidth"] = "6Mi"
    pod = lab.pod("crun", config=config)
    assert shaped_rates() == sorted([*before, 4_000_000, 6 << 20])
    server, client = serve(lab, pod, "shaped"), serve(lab, free, "free")
    (address,) = addresses_of(lab, pod)
    (other,) = addresses_of(lab, free)
    assert (fetch_inside(lab, client, address), fetch_inside(lab, server, other)) == ("shaped", "free")
    lab.cri.stop_pod(pod)
    assert shaped_rates() == before
    config = lab.pod_config(network=pb.POD)
    config.annotations["kubernetes.io/ingress-bandwidth"] = "fast"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "annotation kubernetes.io/ingress-bandwidth: 'fast' is not"):
        lab.pod("crun", config=config)


def shaped_rates() -> list[int]:
    """The rates of all token bucket filters of the node, in bits per second."""
    shown = subprocess.run(["tc", "-json", "qdisc"], capture_output=True, text=True, check=True).stdout
    return sorted(8 * entry["options"]["rate"] for entry in json.loads(shown) if entry["kind"] == "tbf")


def test_the_first_of_several_networks_counts(lab: Lab) -> None:
    """And each pod is detached from the one that it was attached to, whatever has become of its file."""
    first = lab.daemon.cni / "10-pods.conflist"
    network = json.loads(first.read_text())

    def write(name: str, number: int) -> None:
        bridge, *others = network["plugins"]
        ipam = {**bridge["ipam"], "ranges": [[{"subnet": f"10.201.{number}.0/24"}]]}
        plugins = [{**bridge, "bridge": f"{lab.daemon.bridge}-{number}", "ipam": ipam}, *others]
        document = {**network, "name": f"net{name[:2]}", "plugins": plugins}
        (lab.daemon.cni / name).write_text(json.dumps(document))

    def leases() -> set[str]:
        return {path.name for path in lab.daemon.leases.parent.glob("*/10.*")}

    def subnet_of_new_pod() -> str:
        pods.append(lab.pod("crun", network=pb.POD))
        (address,) = addresses_of(lab, pods[-1])
        assert address in leases()
        return address.rpartition(".")[0]

    pods: list[Pod] = []
    try:
        write("20.conflist", 20)
        write("ignored.txt", 99)
        assert not subnet_of_new_pod().startswith("10.201.")
        write("05.conflist", 5)
        assert subnet_of_new_pod() == "10.201.5"
        write("05.conflist", 6)  # the same name, another bridge and range
        assert subnet_of_new_pod() == "10.201.6"
        (lab.daemon.cni / "05.conflist").rename(lab.daemon.cni / "30.conflist")
        first.unlink()
        assert subnet_of_new_pod() == "10.201.20"
        assert len(leases()) == 4
        lab.daemon.restart()
        for pod in pods:
            lab.cri.stop_pod(pod)
        assert not leases()
    finally:
        for number in (5, 6, 20):
            subprocess.run(["ip", "link", "delete", f"{lab.daemon.bridge}-{number}"], capture_output=True, check=False)


def test_a_pod_keeps_its_network_over_a_restart_of_the_daemon(lab: Lab) -> None:
    config = lab.pod_config(network=pb.POD)
    config.port_mappings.add(protocol=pb.TCP, container_port=80, host_port=18090)
    pod = lab.pod("crun", config=config)
    (address,) = addresses_of(lab, pod)
    serve(lab, pod, "still here")
    lab.daemon.restart()
    status = lab.cri.pod_status(pod)
    assert status.state == pb.SANDBOX_READY
    assert addresses_of(lab, pod) == [address]
    assert status.linux.namespaces.options.network == pb.POD
    assert (fetch(address), fetch("127.0.0.1", 18090)) == ("still here", "still here")
    assert (lab.daemon.leases / address).exists()
    # Another pod gets another address, and what was attached before the restart is detached after it.
    assert addresses_of(lab, lab.pod("crun", network=pb.POD)) != [address]
    lab.cri.stop_pod(pod)
    assert lab.cri.pod_status(pod).state == pb.SANDBOX_NOTREADY
    assert not (lab.daemon.leases / address).exists()
    with pytest.raises(ConnectionRefusedError):
        fetch("127.0.0.1", 18090)


def test_both_address_families(lab: Lab) -> None:
    file = lab.daemon.cni / "10-pods.conflist"
    network = json.loads(file.read_text())
    ipam = network["plugins"][0]["ipam"]
    ipam["ranges"].insert(0, [{"subnet": "fd00:88::/64"}])
    ipam["routes"].append({"dst": "::/0"})
    file.write_text(json.dumps(network))
    pod = lab.pod("crun", network=pb.POD)
    addresses = addresses_of(lab, pod)
    assert [ipaddress.ip_address(address).version for address in addresses] == [4, 6]
    server = serve(lab, pod, "both")
    assert fetch(addresses[0]) == "both"
    assert fetch_inside(lab, server, "::1") == "both"
    # The bridge uses its own new address only when no neighbour has claimed it for a second or two.
    eventually(lambda: "tentative" not in shown_addresses(lab.daemon.bridge))
    assert fetch(addresses[1]) == "both"


def test_a_network_comes_and_goes_without_a_restart(lab: Lab) -> None:
    file = lab.daemon.cni / "10-pods.conflist"
    text = file.read_text()
    assert network_condition(lab).status

    file.unlink()
    condition = network_condition(lab)
    assert (condition.status, condition.reason) == (False, "NetworkPluginNotReady")
    assert str(lab.daemon.cni) in condition.message
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "no readable CNI configuration"):
        lab.pod("crun", network=pb.POD)
    # Pods of the node's network run all the same, Linux and Wasm.
    for handler in ("runc", "crun", "wasm"):
        pod = lab.pod(handler)
        status = lab.cri.pod_status(pod)
        assert (status.state, status.network.ip) == (pb.SANDBOX_READY, "")
        assert lab.output(pod, lab.shell("echo runs")) == (0, ["runs"])

    for broken, words in (
        ("{", "10-pods.conflist"),
        (text.replace('"bridge",', '"no-such-plugin",', 1), "no-such-plugin"),
    ):
        file.write_text(broken)
        assert words in network_condition(lab).message
    file.write_text(text)
    condition = network_condition(lab)
    assert (condition.status, condition.reason, condition.message) == (True, "", "")
    pod = lab.pod("crun", network=pb.POD)
    serve(lab, pod, "back")
    (address,) = addresses_of(lab, pod)
    assert fetch(address) == "back"

    # What was attached can be detached without the file.
    file.unlink()
    lab.cri.stop_pod(pod)
    assert not (lab.daemon.leases / address).exists()
