"""Wasm containers in processes of their own, over the CRI: who gets one, and that it goes on without the daemon.

What a worker is and may is held by `tests/contract/test_wasm_workers.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import wasm as guests
from tests.support.cri import Cri, container_config, whole_lines
from tests.support.expect import eventually
from tests.support.images import Registry

pytestmark = pytest.mark.root

PROCESS = {"cri-shim.io/isolation": "process"}


def details(cri: Cri, container: str) -> Mapping[str, Any]:
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    found: Mapping[str, Any] = json.loads(cri.runtime.ContainerStatus(request).info["info"])
    return found


def test_a_worker_in_a_pod_with_a_network_outlives_the_daemon(lab: Lab, registry: Registry) -> None:
    reference = registry.push_wasm("workers/sleep:1", guests.SLEEP)
    lab.cri.pull(reference)
    config = lab.pod_config(network=pb.POD)
    config.annotations.update(PROCESS)
    pod = lab.pod("wasm", config=config)
    asked = container_config(reference)
    asked.linux.resources.memory_limit_in_bytes = 32 << 20
    container = lab.cri.run(pod, asked)
    eventually(lambda: whole_lines(lab.cri.log(container)) == ["going to sleep"])
    shown = details(lab.cri, container)
    assert (shown["placement"], shown["placementReason"]) == ("process", "the pod's annotation cri-shim.io/isolation")
    pid = shown["pid"]
    netns = lab.daemon.state / "pods" / pod.id / "ns" / "net"
    assert Path(f"/proc/{pid}/ns/net").stat().st_ino == netns.stat().st_ino
    stats = lab.cri.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=container)).stats
    assert stats.cpu.usage_core_nano_seconds.value > 0
    assert 0 < stats.memory.working_set_bytes.value < 32 << 20
    before = lab.cri.status(container)
    lab.daemon.kill()
    lab.daemon.start()
    with lab.daemon.client() as cri:
        assert cri.status(container) == before
        assert details(cri, container)["pid"] == pid
        cri.stop(container, 5)
        assert cri.status(container).exit_code == 143


def test_a_created_worker_is_started_by_the_next_daemon(lab: Lab, registry: Registry) -> None:
    reference = registry.push_wasm("workers/hello:1", guests.HELLO)
    lab.cri.pull(reference)
    config = lab.pod_config()
    config.annotations.update(PROCESS)
    container = lab.cri.create(lab.pod("wasm", config=config), container_config(reference))
    lab.daemon.restart()
    with lab.daemon.client() as cri:
        cri.start(container)
        assert cri.wait_exit(container).exit_code == 0
        assert whole_lines(cri.log(container)) == ["hello from wasm"]


def test_a_user_with_a_volume_gets_a_worker_by_itself(lab: Lab, registry: Registry, tmp_path: Path) -> None:
    reference = registry.push_wasm("workers/write:1", guests.writes_file(3, "mine", "written"))
    lab.cri.pull(reference)
    tmp_path.chmod(0o777)
    config = container_config(reference)
    config.mounts.add(host_path=str(tmp_path), container_path="/data")
    config.linux.security_context.run_as_user.value = 1234
    container = lab.cri.run(lab.pod("wasm"), config)
    assert lab.cri.wait_exit(container).exit_code == 0
    shown = details(lab.cri, container)
    assert (shown["placement"], shown["placementReason"]) == (
        "process",
        "/data is a mount, and the module's user is user 1234",
    )
    assert (tmp_path / "mine").stat().st_uid == 1234


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_a_file_of_another_user_is_out_of_reach(lab: Lab, registry: Registry, tmp_path: Path, isolation: str) -> None:
    """Whatever is asked for: file calls of a module in the daemon would have the daemon's rights."""
    tmp_path.chmod(0o755)
    for name, owner in (("mine", 1234), ("theirs", 4321)):
        (tmp_path / name).write_text(f"{name}\n")
        os.chown(tmp_path / name, owner, owner)
        (tmp_path / name).chmod(0o600)
    config = lab.pod_config()
    if isolation == "process":
        config.annotations.update(PROCESS)
    pod = lab.pod("wasm", config=config)
    for number, (name, user, said) in enumerate(
        (("mine", 1234, ["mine"]), ("theirs", 1234, []), ("theirs", 0, ["theirs"]))
    ):
        image = registry.push_wasm(f"workers/{name}:1", guests.prints_file(3, name))
        lab.cri.pull(image)
        asked = container_config(image, name=f"c{number}")
        asked.mounts.add(host_path=str(tmp_path), container_path="/data", readonly=True)
        asked.linux.security_context.run_as_user.value = user
        code, lines = lab.output(pod, asked)
        assert (code == 0, lines) == (bool(said), said)
