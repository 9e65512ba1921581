"""Modules that listen, in pods with a network: reached by the pod's address, a host port and port-forward's way.

What the calls on sockets do is held by `tests/contract/test_wasm_listen.py`.
"""

from __future__ import annotations

import socket

import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import components, images
from tests.support import wasm as guests
from tests.support.cri import container_config, whole_lines
from tests.support.images import Registry

pytestmark = pytest.mark.root


def answer(address: str, port: int) -> bytes:
    with socket.create_connection((address, port), 10) as connection:
        return connection.recv(100)


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_a_listener_is_reached_as_any_server_of_a_pod(lab: Lab, registry: Registry, isolation: str) -> None:
    reference = registry.push_wasm("listen/greeter:1", guests.GREETER)
    lab.cri.pull(reference)
    config = lab.pod_config(network=pb.POD)
    config.annotations["cri-shim.io/listen"] = "80"
    if isolation == "process":
        config.annotations["cri-shim.io/isolation"] = isolation
    config.port_mappings.add(container_port=80, host_port=18095)
    pod = lab.pod("wasm", config=config)
    container = lab.cri.run(pod, container_config(reference))
    lab.cri.wait_log(container, "listening")
    assert answer(lab.cri.pod_status(pod).network.ip, 80) == b"hello from wasm\n"
    assert answer("127.0.0.1", 18095) == b"hello from wasm\n"
    # A sidecar finds it on the loopback that they share.
    sidecar = lab.cri.run(pod, lab.shell("nc 127.0.0.1 80", name="sidecar"))
    assert lab.cri.wait_exit(sidecar).exit_code == 0
    assert whole_lines(lab.cri.log(sidecar)) == ["hello from wasm"]
    lab.cri.stop(container, 5)
    assert lab.cri.status(container).exit_code == 143
    with pytest.raises(ConnectionRefusedError):
        answer(lab.cri.pod_status(pod).network.ip, 80)


def test_a_graceful_stop_is_over_when_the_module_is(lab: Lab, registry: Registry) -> None:
    reference = registry.push_wasm("listen/greeter:1", guests.GREETER)
    lab.cri.pull(reference)
    config = lab.pod_config()
    config.annotations.update({"cri-shim.io/listen": "18096", "cri-shim.io/stop": "graceful"})
    container = lab.cri.run(lab.pod("wasm", config=config), container_config(reference))
    lab.cri.wait_log(container, "listening")
    assert answer("127.0.0.1", 18096) == b"hello from wasm\n"
    lab.cri.stop(container, 60)
    assert lab.cri.status(container).exit_code == 0


def test_two_servers_in_a_pod(lab: Lab, registry: Registry) -> None:
    """Each with the port that the pod names for it, and one more with that of its image."""
    greeter = guests.assemble(guests.GREETER)
    plain = registry.push("listen/plain:1", images.wasm_artifact(greeter))
    labelled = registry.push("listen/labelled:1", images.wasm_image(greeter, {"Labels": {"cri-shim.io/listen": "83"}}))
    config = lab.pod_config(network=pb.POD)
    config.annotations.update({"cri-shim.io/listen.one": "81", "cri-shim.io/listen.two": "82"})
    pod = lab.pod("wasm", config=config)
    for name, image in (("one", plain), ("two", plain), ("three", labelled)):
        lab.cri.pull(image)
        lab.cri.wait_log(lab.cri.run(pod, container_config(image, name=name)), "listening")
    address = lab.cri.pod_status(pod).network.ip
    assert [answer(address, port) for port in (81, 82, 83)] == [b"hello from wasm\n"] * 3


def test_a_component_is_reached_as_any_server_of_a_pod_and_reaches_others(lab: Lab, registry: Registry) -> None:
    server = registry.push_wasm("listen/component:1", components.echo_server("0.0.0.0", 80))
    client = registry.push_wasm("connect/component:1", components.client("127.0.0.1", 80, "to itself\n"))
    for reference in (server, client):
        lab.cri.pull(reference)
    config = lab.pod_config(network=pb.POD)
    config.port_mappings.add(container_port=80, host_port=18097)
    pod = lab.pod("wasm", config=config)
    container = lab.cri.run(pod, container_config(server))
    lab.cri.wait_log(container, "listening")
    for address, port in ((lab.cri.pod_status(pod).network.ip, 80), ("127.0.0.1", 18097)):
        with socket.create_connection((address, port), 10) as connection:
            connection.sendall(b"hello")
            assert connection.recv(100) == b"hello"
    # Another component and a Linux container of the pod find it on their loopback.
    neighbour = lab.cri.run(pod, container_config(client, name="client"))
    assert lab.cri.wait_exit(neighbour).exit_code == 0
    assert whole_lines(lab.cri.log(neighbour)) == ["to itself"]
    sidecar = lab.cri.run(pod, lab.shell("echo hello | nc 127.0.0.1 80", name="sidecar"))
    assert lab.cri.wait_exit(sidecar).exit_code == 0
    assert whole_lines(lab.cri.log(sidecar)) == ["hello"]
    lab.cri.stop(container, 5)
    assert lab.cri.status(container).exit_code == 143
    with pytest.raises(ConnectionRefusedError):
        answer(lab.cri.pod_status(pod).network.ip, 80)


def test_a_component_knows_the_names_of_its_pod(lab: Lab, registry: Registry) -> None:
    reference = registry.push_wasm("names/component:1", components.resolves("elsewhere.example"))
    lab.cri.pull(reference)
    config = lab.pod_config(network=pb.POD)
    config.dns_config.servers.append("127.0.0.1")
    config.dns_config.options.extend(["timeout:1", "attempts:1"])
    pod = lab.pod("wasm", config=config)
    container = lab.cri.run(pod, container_config(reference))
    # Nobody answers there: the failure is a temporary one (100 + the number of the error code).
    assert lab.cri.wait_exit(container).exit_code == 119
