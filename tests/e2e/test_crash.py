"""The daemon killed at any moment, and started again: nothing lost that ran, nothing left that was half made."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support.cri import Cri, container_config
from tests.support.daemon import Daemon
from tests.support.expect import eventually
from tests.support.scale import count, seeded
from tests.support.world import difference, settle, unchanged, world_of

pytestmark = pytest.mark.root


def _create_pods(lab: Lab, number: int, stop: threading.Event) -> None:
    """Create pods with a container each, as fast as they go, until the daemon is gone."""
    handlers = ("runc", "crun", "wasm")

    def one(index: int) -> None:
        config = lab.pod_config(
            network=pb.POD if index % 2 else pb.NODE, pid=pb.POD if index % 5 == 0 else pb.CONTAINER
        )
        handler = handlers[index % 3]
        image = lab.wasm if handler == "wasm" else lab.busybox
        command = () if handler == "wasm" else ("sleep", "1000")
        pid = pb.POD if index % 5 == 0 else pb.CONTAINER
        with Cri(lab.daemon.socket) as cri:
            try:
                pod = cri.run_pod(config, handler)
                cri.run(pod, container_config(image, *command, pid=pid))
                if handler == "wasm":  # what Linux containers need comes with the first one
                    cri.run(pod, container_config(lab.busybox, "sleep", "1000", name="sidecar", pid=pid))
            except grpc.RpcError:
                if not stop.is_set():
                    raise

    with ThreadPoolExecutor(max_workers=number) as pool:
        for future in [pool.submit(one, index) for index in range(number)]:
            future.result()


def _kill_in_the_middle(lab: Lab, number: int, after: float) -> None:
    stop = threading.Event()
    storm = threading.Thread(target=_create_pods, args=(lab, number, stop))
    storm.start()
    time.sleep(after)
    stop.set()
    lab.daemon.kill()
    storm.join(60)
    assert not storm.is_alive()


def test_kill_in_the_middle_of_many_creations_leaves_nothing(lab: Lab) -> None:
    settle(lab.daemon, {"runc": lab.busybox, "crun": lab.busybox, "wasm": lab.wasm})
    moments = seeded()
    for _ in range(count(full=5, quick=2)):
        with unchanged(lab.daemon):
            _kill_in_the_middle(lab, count(full=100, quick=24), moments.uniform(0.2, 4.0))
            lab.daemon.start()
            with lab.daemon.client() as cri:
                assert {pod.state for pod in cri.pods()} <= {pb.SANDBOX_READY, pb.SANDBOX_NOTREADY}
                cri.remove_all_pods()
                assert not cri.pods()
                assert not cri.containers()
                cri.runtime.Status(pb.StatusRequest())


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_everything_is_there_after_a_restart(lab: Lab, end: str) -> None:
    daemon, cri = lab.daemon, lab.cri
    pods = {handler: lab.pod(handler, network=pb.POD) for handler in ("runc", "crun")}
    shared = lab.pod("crun", pid=pb.POD)
    running = [cri.run(pod, lab.shell("while :; do echo tick; sleep 0.1; done")) for pod in pods.values()]
    running.append(cri.run(shared, container_config(lab.busybox, "sleep", "1000", pid=pb.POD)))
    created = cri.create(pods["crun"], lab.shell("exit 4", name="later"))
    ended = cri.run(pods["runc"], lab.shell("exit 6", name="ended"))
    cri.wait_exit(ended)
    everything = [*running, created, ended]
    statuses = [cri.status(container) for container in everything]
    pod_statuses = [cri.pod_status(pod) for pod in (*pods.values(), shared)]
    images = sorted(image.id for image in cri.images.ListImages(pb.ListImagesRequest()).images)

    if end == "stop":
        assert daemon.stop() == 0
    else:
        daemon.kill()
    daemon.start()

    with daemon.client() as again:
        assert [again.status(container) for container in everything] == statuses
        assert [again.pod_status(pod) for pod in (*pods.values(), shared)] == pod_statuses
        assert sorted(image.id for image in again.images.ListImages(pb.ListImagesRequest()).images) == images
        again.start(created)
        assert again.wait_exit(created).exit_code == 4
        for container in running:
            assert again.exec(container, ["true"]).exit_code == 0
            again.stop(container)
            assert again.status(container).exit_code == 137
        again.remove_all_pods()


def test_a_lost_database_costs_the_pods_and_leaves_nothing_of_them(lab: Lab) -> None:
    daemon = lab.daemon
    settle(daemon, {"runc": lab.busybox, "crun": lab.busybox})
    kinds = ("processes", "mounts", "cgroups", "leases", "links")
    before = world_of(daemon)
    for handler in ("runc", "crun"):
        pod = lab.pod(handler, network=pb.POD, pid=pb.POD)
        lab.cri.run(pod, container_config(lab.busybox, "sleep", "1000", pid=pb.POD))
        lab.cri.create(pod, container_config(lab.busybox, "sleep", "1000", name="created"))
    assert all(world_of(daemon)[kind] > before[kind] for kind in kinds)
    daemon.kill()
    for file in daemon.root.glob("state.db*"):
        file.unlink()
    daemon.start()
    with daemon.client() as cri:
        assert not cri.pods()
        assert not cri.containers()
    left = world_of(daemon)
    assert not difference({kind: before[kind] for kind in kinds}, left)
    assert not [path for place in ("pods", "containers") for path in (daemon.state / place).iterdir()]


def test_wasm_containers_end_with_the_daemon_and_say_so(lab: Lab) -> None:
    pod = lab.pod("wasm")
    never = lab.cri.create(pod, container_config(lab.wasm, name="created"))
    done = lab.cri.run(pod, container_config(lab.wasm, name="done"))
    lab.cri.wait_exit(done)
    lab.daemon.restart()
    with lab.daemon.client() as again:
        assert again.status(done).exit_code == 0
        assert again.status(never).state == pb.CONTAINER_CREATED
        again.start(never)
        assert again.wait_exit(never).exit_code == 0


def test_a_dead_monitor_is_noticed(lab: Lab) -> None:
    """SIGKILL to conmon: the container is ended, and the client is told that nobody knows how."""
    container = lab.cri.run(lab.pod("crun"), lab.shell("exec sleep 1000"))
    _kill_process(lab.daemon, "conmon", container)
    status = lab.cri.wait_exit(container)
    assert (status.exit_code, status.reason) == (255, "Unknown")
    assert "monitor" in status.message


def test_a_dead_infra_process_makes_the_pod_not_ready(lab: Lab) -> None:
    pod = lab.pod("crun", pid=pb.POD)
    _kill_process(lab.daemon, "catatonit -P")
    eventually(lambda: lab.cri.pod_status(pod).state == pb.SANDBOX_NOTREADY)
    lab.cri.remove_pod(pod)


def _kill_process(daemon: Daemon, *words: str) -> None:
    (line,) = [line for line in daemon.traces().processes if all(word in line for word in words)]
    os.kill(int(line.split()[0]), signal.SIGKILL)


def test_a_second_daemon_on_the_same_root_is_refused(lab: Lab) -> None:
    second = Daemon(lab.daemon.base, number=99, cgroup_parent=lab.daemon.cgroup_parent)
    second.spawn()
    assert second.wait() == 1
    assert "another cri-shim runs on" in lab.daemon.log.read_text()
    lab.cri.remove_pod(lab.pod("crun"))


def test_a_repeated_request_joins_the_one_that_its_caller_gave_up(lab: Lab) -> None:
    config = lab.pod_config(network=pb.POD)
    request = pb.RunPodSandboxRequest(config=config, runtime_handler="crun")
    with pytest.raises(grpc.RpcError):
        lab.cri.runtime.RunPodSandbox(request, timeout=0.005)
    pod = lab.pod("crun", config=config)
    assert [item.id for item in lab.cri.pods()] == [pod.id]
