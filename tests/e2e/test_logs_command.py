"""`cri-shim logs` on what containers of each handler write, through rotations, restarts and the end of the daemon."""

from __future__ import annotations

import gzip
import os
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import container_config
from tests.support.daemon import PROGRAM
from tests.support.expect import eventually
from tests.support.scale import count

pytestmark = pytest.mark.root
PORTION = 1000


def logs(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [str(PROGRAM), "logs", "--listen", str(lab.daemon.socket), *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def follow(lab: Lab, container: str, output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        argv = [str(PROGRAM), "logs", "--follow", "--listen", str(lab.daemon.socket), container]
        return subprocess.Popen(argv, stdout=file, stderr=subprocess.DEVNULL)


def attempt(config: pb.ContainerConfig, number: int) -> pb.ContainerConfig:
    """A later try at the same container, as the kubelet makes it."""
    again = pb.ContainerConfig()
    again.CopyFrom(config)
    again.metadata.attempt = number
    again.log_path = f"{config.metadata.name}/{number}.log"
    return again


def numbers(lab: Lab, registry: images.Registry, handler: str, last: int) -> pb.ContainerConfig:
    if handler != "wasm":
        lines = (
            f"i=0; while [ $i -lt {last} ]; do seq $((i + 1)) $((i + {PORTION})); i=$((i + {PORTION})); usleep 1; done"
        )
        return lab.shell(lines if last > PORTION else f"seq {last}")
    image = registry.push_wasm(f"logs/counts-{last}:1", guests.counts(last))
    lab.cri.pull(image)
    return container_config(image)


def wait_until(text: str, output: Path, within: float = 20) -> None:
    deadline = time.monotonic() + within
    while text not in output.read_text():
        assert time.monotonic() < deadline, output.read_text()[-500:]
        time.sleep(0.05)


def is_open(lab: Lab, path: Path) -> bool:
    """In the daemon: its reader is there, since Linux containers write their logs without it."""
    links = [Path(f"/proc/{lab.daemon.pid}/fd/{name}") for name in os.listdir(f"/proc/{lab.daemon.pid}/fd")]
    return path in [link.readlink() for link in links if link.is_symlink()]


def rotate(lab: Lab, container: str) -> int:
    """Rotate the log as fast as that goes while the container writes, much faster than a reader looks; how often.

    Old files are compressed or removed at once, as the kubelet does it in its time.
    """
    path = Path(lab.cri.status(container).log_path)
    for number in range(40):
        while not path.exists() or not path.stat().st_size:
            if lab.cri.status(container).state == pb.CONTAINER_EXITED:
                return number
            time.sleep(0.001)
        old = path.with_name(f"{path.name}.{number}")
        path.rename(old)
        try:
            lab.cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container), timeout=10)
        except grpc.RpcError:
            old.rename(path)  # it has ended meanwhile
            return number
        if number % 2:
            old.with_suffix(".gz").write_bytes(gzip.compress(old.read_bytes(), 1))
        old.unlink()
    return 40


def test_the_lines_of_crictl(shared_lab: Lab) -> None:
    """Both streams apart; times, the last lines, and what is younger than some time, as crictl shows them."""
    lab = shared_lab
    script = "echo one; echo two >&2; printf 'in two '; sleep 0.2; echo pieces; echo three"
    container = lab.cri.run(lab.pod("runc"), lab.shell(script))
    lab.cri.wait_exit(container)
    said = logs(lab, container)
    assert (said.returncode, said.stdout, said.stderr) == (0, "one\nin two pieces\nthree\n", "two\n")
    assert logs(lab, "--tail", "1", container[:13]).stdout == "three\n"
    assert logs(lab, "--tail", "0", container).stdout == ""
    assert logs(lab, "--since", "1h", container).stdout == said.stdout
    assert logs(lab, "--since", "2100-01-01T00:00:00Z", container).stdout == ""
    file = Path(lab.cri.status(container).log_path).read_text().splitlines()
    stamped = logs(lab, "--timestamps", container).stdout.splitlines()
    assert [line.split(" ", 1)[1] for line in stamped] == ["one", "in two pieces", "three"]
    assert stamped[0].partition(" ")[0] == file[0].partition(" ")[0].replace("+00:00", "Z")


def test_what_cannot_be_read_is_said(shared_lab: Lab) -> None:
    lab = shared_lab
    assert logs(lab, "0123abc").stderr == "cri-shim: container '0123abc' does not exist\n"
    container = lab.cri.create(lab.pod("runc"), lab.shell("true"))
    assert "neither a time" in logs(lab, "--since", "yesterday", container).stderr
    silent = lab.shell("true", name="silent")
    silent.log_path = ""
    container = lab.cri.create(lab.pod("runc"), silent)
    said = logs(lab, container)
    assert (said.returncode, said.stdout) == (1, "")
    assert "has no log" in said.stderr


@pytest.mark.parametrize("handler", ["runc", "crun", "wasm"])
def test_followed_through_rotations_and_a_restart(
    shared_lab: Lab, registry: images.Registry, handler: str, tmp_path: Path
) -> None:
    lab, last = shared_lab, count(full=2_000_000, quick=300_000)
    pod, config = lab.pod(handler), numbers(lab, registry, handler, last)
    container = lab.cri.create(pod, config)
    output = tmp_path / "out"
    reader = follow(lab, container, output)
    try:
        if handler != "wasm":
            eventually(lambda: is_open(lab, Path(lab.cri.status(container).log_path)))
        lab.cri.start(container)
        if handler == "wasm":
            wait_until("\n7\n", output)
        assert rotate(lab, container) > 2
        lab.cri.wait_exit(container, within=120)
        wait_until(f"\n{last}\n", output)
        second = lab.cri.run(pod, attempt(numbers(lab, registry, handler, 7), 1))
        lab.cri.wait_exit(second)
        lab.cri.stop_pod(pod)
        assert reader.wait(20) == 0
    finally:
        reader.kill()
        reader.wait()
    wanted = [str(number) for number in (*range(1, last + 1), *range(1, 8))]
    assert output.read_text().splitlines() == wanted


def test_who_follows_does_not_hold_up_the_stop_of_the_daemon(lab: Lab, tmp_path: Path) -> None:
    container = lab.cri.run(lab.pod("runc"), lab.shell("echo ready; sleep 60"))
    output = tmp_path / "out"
    reader = follow(lab, container, output)
    try:
        wait_until("ready\n", output)
        begin = time.monotonic()
        assert lab.daemon.stop() == 0
        assert time.monotonic() - begin < 9  # DRAIN_SECONDS is what it would wait for
        assert reader.wait(20) == 1
    finally:
        reader.kill()
        reader.wait()
