"""The main path, end to end: one daemon, a pod by each handler, from the pull to the last trace gone."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.support.cri import Cri, container_config
from tests.support.daemon import Daemon
from tests.support.expect import eventually, refused

LINUX = pytest.mark.parametrize("handler", ["runc", "crun"])


@pytest.mark.root
@LINUX
def test_a_linux_container_runs_logs_and_tells_its_exit_code(
    daemon: Daemon, cri: Cri, busybox: str, handler: str
) -> None:
    image = cri.pull(busybox)
    pod = cri.run_pod(daemon.pod_config(), handler)
    container = cri.run(pod, container_config(busybox, "sh", "-c", "echo out; echo err >&2; exit 3"))
    status = cri.wait_exit(container)
    assert (status.exit_code, status.reason, status.image_id) == (3, "Error", image)
    assert status.created_at <= status.started_at <= status.finished_at
    assert {(line.stream, line.text) for line in cri.log(container)} == {("stdout", "out"), ("stderr", "err")}


@pytest.mark.root
@LINUX
def test_a_pod_has_a_network_a_name_and_a_second_process(daemon: Daemon, cri: Cri, busybox: str, handler: str) -> None:
    cri.pull(busybox)
    pod = cri.run_pod(daemon.pod_config(), handler)
    container = cri.run(pod, container_config(busybox, "sleep", "600"))
    address = cri.pod_status(pod).network.ip
    shown = cri.exec(container, ["sh", "-c", "hostname; ip -4 -o addr show eth0; cat /proc/1/cmdline"])
    assert shown.exit_code == 0
    assert shown.stdout.decode().splitlines()[0] == pod.config.hostname
    assert f" {address}/" in shown.stdout.decode()
    assert shown.stdout.endswith(b"sleep\x00600\x00")
    assert cri.exec(container, ["sh", "-c", "echo no >&2; exit 7"]).exit_code == 7


@pytest.mark.root
@LINUX
def test_a_running_container_outlives_the_daemon(daemon: Daemon, cri: Cri, busybox: str, handler: str) -> None:
    cri.pull(busybox)
    pod = cri.run_pod(daemon.pod_config(), handler)
    # It waits for the end of who says go: its own is the end of all processes in it.
    script = "pidof sh >/pids || exit 6; until [ -e /go ] && ! pidof touch; do sleep 0.05; done; exit 5"
    container = cri.run(pod, container_config(busybox, "sh", "-c", script))
    before = cri.status(container)
    daemon.kill()
    daemon.start()
    with daemon.client() as again:
        assert again.status(container) == before
        assert again.exec(container, ["touch", "/go"]).exit_code == 0
        assert again.wait_exit(container).exit_code == 5


@pytest.mark.root
def test_a_daemon_that_stops_at_once_leaves_nothing_of_its_questions_to_runtimes(daemon: Daemon) -> None:
    runtime = daemon.state / "runtime" / "crun"
    ours = hashlib.sha256(bytes(runtime / ".probe")).hexdigest()[:16]
    for milliseconds in range(0, 80, 10):
        daemon.stop()
        daemon.start()
        time.sleep(milliseconds / 1000)
        daemon.stop()
        assert not list(runtime.glob("*"))
        assert not list(Path("/sys/fs/cgroup").glob(f"*/cri-shim-probe-{ours}"))
        daemon.start()


@pytest.mark.root
@LINUX
def test_an_exit_while_the_daemon_was_away_is_reported_as_it_was(
    daemon: Daemon, cri: Cri, busybox: str, handler: str
) -> None:
    cri.pull(busybox)
    pod = cri.run_pod(daemon.pod_config(), handler)
    container = cri.run(pod, container_config(busybox, "sh", "-c", "echo up; sleep 1; exit 9"))
    cri.wait_log(container, "up")
    assert daemon.stop() == 0
    # The monitor goes last, when the exit is on disk.
    eventually(lambda: not any("conmon" in line for line in daemon.traces().processes))
    daemon.start()
    with daemon.client() as again:
        status = again.wait_exit(container)
    assert (status.exit_code, status.reason) == (9, "Error")


def test_a_wasm_artifact_runs_in_the_daemon(daemon: Daemon, cri: Cri, wasm_hello: str) -> None:
    cri.pull(wasm_hello)
    pod = cri.run_pod(daemon.pod_config(network=pb.NODE), "wasm")
    container = cri.run(pod, container_config(wasm_hello))
    status = cri.wait_exit(container)
    assert (status.exit_code, status.reason) == (0, "Completed")
    assert [(line.stream, line.text) for line in cri.log(container)] == [("stdout", "hello from wasm")]
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "exited"):
        cri.exec(container, ["true"])


def test_an_unknown_handler_is_refused_by_name_and_leaves_nothing(daemon: Daemon, cri: Cri) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "spin"):
        cri.run_pod(daemon.pod_config(network=pb.NODE), "spin")
    assert not cri.pods()
    assert not list((daemon.state / "pods").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="what a plain user gets")
def test_a_plain_user_is_told_why_linux_pods_do_not_run(daemon: Daemon, cri: Cri) -> None:
    names = {handler.name for handler in cri.runtime.Status(pb.StatusRequest()).runtime_handlers}
    assert names == {"", "wasm"}
    with refused(grpc.StatusCode.NOT_FOUND, "runc"):
        cri.run_pod(daemon.pod_config(network=pb.NODE), "runc")


@pytest.mark.root
def test_removed_pods_leave_neither_process_nor_mount_nor_address(daemon: Daemon, cri: Cri, busybox: str) -> None:
    cri.pull(busybox)
    for handler in ("runc", "crun"):
        pod = cri.run_pod(daemon.pod_config(), handler)
        cri.run(pod, container_config(busybox, "sleep", "600"))
    assert sum("conmon" in line for line in daemon.traces().processes) == 2
    cri.remove_all_pods()
    left = daemon.traces()
    assert not left.mounts
    assert not left.cgroups
    assert not [line for line in left.processes if "conmon" in line or "sleep" in line]
    assert not [lease for lease in daemon.leases.iterdir() if lease.name.startswith("10.")]
    assert not list((daemon.state / "containers").iterdir())
