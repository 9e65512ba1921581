"""The network that `cri-shim doctor` offers to a node without one: a pod has it, and reaches the node and back."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import MakeDaemon
from tests.support import images
from tests.support.cri import container_config, whole_lines
from tests.support.daemon import PROGRAM, Daemon

pytestmark = pytest.mark.root

BRIDGE = "cri-shim0"


def doctor(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [str(PROGRAM), "doctor", "--config", str(daemon.config), *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def bridge() -> Iterator[str]:
    yield BRIDGE
    subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)


def test_the_offered_network_works(
    make_daemon: MakeDaemon, registry: images.Registry, busybox: str, bridge: str
) -> None:
    daemon = make_daemon()
    place = daemon.cni / "10-pods.conflist"
    place.unlink()
    assert "LACKS  a pod network" in doctor(daemon).stdout
    offered = json.loads(doctor(daemon, "--conflist").stdout)
    assert offered["plugins"][0]["bridge"] == bridge
    offered["plugins"][0]["ipam"]["dataDir"] = str(daemon.leases.parent)  # leases that go with the test
    place.write_text(json.dumps(offered))
    assert "has    a pod network" in doctor(daemon).stdout
    with daemon.client() as cri:
        cri.pull(busybox)
        pod = cri.run_pod(daemon.pod_config(), "runc")
        assert cri.pod_status(pod).network.ip.startswith("10.88.")
        container = cri.run(pod, container_config(busybox, "ping", "-c", "1", "-W", "5", "10.88.0.1"))
        assert cri.wait_exit(container).exit_code == 0, whole_lines(cri.log(container))
        cri.remove_all_pods()
