"""Components of `wasi:http/proxy` in pods with a network: reached by the pod's address, a host port, a neighbour.

What their clients get is held by `tests/contract/test_wasm_http.py`.
"""

from __future__ import annotations

from http.client import HTTPConnection

import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support.cri import container_config, whole_lines
from tests.support.expect import eventually
from tests.support.images import Registry
from tests.support.wasm_http import PROXY

pytestmark = pytest.mark.root

HELLO = b"hello from a component\n"


def get(address: str, port: int, path: str) -> tuple[int, bytes]:
    connection = HTTPConnection(address, port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_a_component_serves_as_any_server_of_a_pod(lab: Lab, registry: Registry) -> None:
    reference = registry.push_wasm("http/proxy:1", PROXY)
    lab.cri.pull(reference)
    config = lab.pod_config(network=pb.POD)
    config.port_mappings.add(container_port=8080, host_port=18097)
    pod = lab.pod("wasm", config=config)
    asked = container_config(reference, "app.wasm")
    asked.linux.resources.memory_limit_in_bytes = 128 << 20
    container = lab.cri.run(pod, asked)
    address = lab.cri.pod_status(pod).network.ip
    assert get(address, 8080, "/hello") == get("127.0.0.1", 18097, "/hello") == (200, HELLO)
    sidecar = lab.cri.run(pod, lab.shell("wget -q -O - http://127.0.0.1:8080/hello", name="sidecar"))
    assert lab.cri.wait_exit(sidecar).exit_code == 0
    assert whole_lines(lab.cri.log(sidecar)) == [HELLO.decode().strip()]
    assert get(address, 8080, "/trap")[0] == 500
    eventually(lambda: "wasm trap" in "".join(whole_lines(lab.cri.log(container))))
    # It has what a container has: usage, exec, a life beyond the daemon's.
    stats = lab.cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats
    assert 0 < stats.memory.working_set_bytes.value < 128 << 20
    assert b"app.wasm" in lab.cri.exec(container, ["ps"]).stdout
    again = lab.cri.exec(container, ["app.wasm"])
    assert (again.exit_code, b"nothing that could be run beside the server" in again.stderr) == (126, True)
    lab.daemon.restart()
    with lab.daemon.client() as cri:
        assert get(address, 8080, "/hello") == (200, HELLO)
        cri.stop(container, 5)
        assert cri.status(container).exit_code == 143
    with pytest.raises(ConnectionRefusedError):
        get(address, 8080, "/hello")
