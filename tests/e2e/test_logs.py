"""Logs under pressure: rotated while a container floods them, and on a disk that is full.

Not their form (`test_process_io`).
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import LogLine, container_config, fault, read_log, whole_lines
from tests.support.scale import count

pytestmark = [pytest.mark.root, pytest.mark.parametrize("handler", ["runc", "crun", "wasm"])]

ENTRY = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}\S* std(out|err) [FP] .*")
SMALL = 1 << 20


def numbers(lab: Lab, registry: images.Registry, handler: str, last: int) -> pb.ContainerConfig:
    """A container that prints the numbers from 1, as fast as it can."""
    if handler != "wasm":
        return lab.shell(f"seq {last}")
    image = registry.push_wasm(f"logs/counts-{last}:1", guests.counts(last))
    lab.cri.pull(image)
    return container_config(image)


def reopen(lab: Lab, container: str) -> bool:
    """Have the log reopened; False when the container has ended before: there is no new file then."""
    try:
        lab.cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container), timeout=10)
    except grpc.RpcError as error:
        code, words = fault(error)
        # Told of one that has ended, or it ended while its log was being reopened.
        assert lab.cri.wait_exit(container).state == pb.CONTAINER_EXITED, f"{code}: {words}"
        return False
    return True


def test_any_name_will_do(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    for number, name in enumerate(("é/日本.log", "a:b c.log", "%s'\"$x.log", "-.log")):
        config = numbers(lab, registry, handler, 1)
        config.metadata.attempt, config.log_path = number, name
        container = lab.cri.run(pod, config)
        lab.cri.wait_exit(container)
        assert lab.cri.status(container).log_path == f"{pod.config.log_directory}/{name}"
        assert whole_lines(lab.cri.log(container)) == ["1"]


def test_rotation_during_a_flood(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    """Renamed and reopened as the kubelet does it, without a pause: no line is lost, and none is there twice."""
    lab, last = shared_lab, count(full=2_000_000, quick=500_000)
    container = lab.cri.run(lab.pod(handler), numbers(lab, registry, handler, last))
    path = Path(lab.cri.status(container).log_path)
    rotated: list[Path] = []
    while lab.cri.status(container).state == pb.CONTAINER_RUNNING:
        old = path.with_name(f"{path.name}.{len(rotated)}")
        path.rename(old)
        rotated.append(old)
        if not reopen(lab, container):
            rotated.pop().rename(path)
            break
        assert path.stat().st_mode & 0o777 == 0o640
    status = lab.cri.wait_exit(container)
    assert (status.exit_code, status.reason) == (0, "Completed")
    assert rotated
    assert path.exists()
    log: list[LogLine] = [line for file in (*rotated, path) for line in read_log(file)]
    assert whole_lines(log) == [str(number) for number in range(1, last + 1)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, for logs only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk(shared_lab: Lab, registry: images.Registry, small_disk: Path, handler: str) -> None:
    """The container does not notice; what does not fit is lost, and at most one line is torn."""
    lab, last = shared_lab, 500_000
    sandbox = lab.pod_config()
    sandbox.log_directory = str(small_disk / "pod")
    pod = lab.pod(handler, config=sandbox)
    begin = time.monotonic()
    container = lab.cri.run(pod, numbers(lab, registry, handler, last))
    status = lab.cri.wait_exit(container, within=60)
    assert (status.exit_code, status.reason) == (0, "Completed")
    assert time.monotonic() - begin < 60
    path = Path(status.log_path)
    assert SMALL * 0.9 < path.stat().st_size <= SMALL
    entries = path.read_text().split("\n")
    torn = [entry for entry in entries[:-1] if not ENTRY.fullmatch(entry)]
    assert len(torn) <= 1, torn
    found = [entry.rpartition(" ")[2] for entry in entries[:-1] if ENTRY.fullmatch(entry)]
    assert found[:1000] == [str(number) for number in range(1, 1001)]
    lab.cri.remove_pod(pod)


def test_a_disk_that_has_room_again(shared_lab: Lab, registry: images.Registry, small_disk: Path, handler: str) -> None:
    """After the kubelet's rotation the log goes on, in whole lines."""
    lab = shared_lab
    sandbox = lab.pod_config()
    sandbox.log_directory = str(small_disk / "pod")
    pod = lab.pod(handler, config=sandbox)
    if handler == "wasm":
        image = registry.push_wasm("logs/count:1", guests.PROGRAMS["count"])
        lab.cri.pull(image)
        config = container_config(image)
    else:
        config = lab.shell("n=0; while :; do echo $n; n=$((n + 1)); sleep 0.02; done")
    container = lab.cri.run(pod, config)
    lab.cri.wait_log(container, "3")
    ballast = small_disk / "ballast"
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=4k"], capture_output=True, check=False)
    path = Path(lab.cri.status(container).log_path)
    path.write_text("x" * path.stat().st_size)  # so that the page that the log ends in has no room either
    with path.open("ab") as log:
        while log.tell() % 4096:
            log.write(b"x")
    time.sleep(0.5)
    ballast.unlink()
    path.unlink()
    assert reopen(lab, container)
    lines = lab.cri.wait_log(container, "")
    deadline = time.monotonic() + 60
    while len(lines) < 20 and time.monotonic() < deadline:
        time.sleep(0.05)
        lines = lab.cri.log(container)
    found = [int(line) for line in whole_lines(lines)]
    assert len(found) >= 20
    assert found == list(range(found[0], found[0] + len(found)))
    lab.cri.remove_pod(pod)
