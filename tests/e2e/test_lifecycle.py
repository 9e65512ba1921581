"""A pod's whole life over the CRI socket, under every handler and network."""

from __future__ import annotations

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support.cri import container_config, fault

pytestmark = pytest.mark.root

NETWORKS = pytest.mark.parametrize("network", [pb.POD, pb.NODE], ids=["bridge", "host"])
LINUX = pytest.mark.parametrize("handler", ["runc", "crun"])


@LINUX
@NETWORKS
def test_linux_pod(lab: Lab, handler: str, network: pb.NamespaceMode.ValueType) -> None:
    cri = lab.cri
    pod = lab.pod(handler, network=network)
    status = cri.pod_status(pod)
    assert status.state == pb.SANDBOX_READY
    assert bool(status.network.ip) == (network == pb.POD)
    assert status.linux.namespaces.options.network == network
    assert status.runtime_handler == handler

    container = cri.create(pod, lab.shell("echo out; echo err >&2; exec sleep 1000"))
    assert cri.status(container).state == pb.CONTAINER_CREATED
    cri.start(container)
    assert cri.status(container).state == pb.CONTAINER_RUNNING
    lines = cri.wait_log(container, "err")
    assert {(line.stream, line.text) for line in lines} == {("stdout", "out"), ("stderr", "err")}
    answer = cri.exec(container, ["sh", "-c", "echo hi; echo ho >&2; exit 3"])
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"hi\n", b"ho\n", 3)

    cri.stop(container)
    ended = cri.status(container)
    assert (ended.state, ended.exit_code, ended.reason) == (pb.CONTAINER_EXITED, 137, "Error")
    assert ended.created_at < ended.started_at < ended.finished_at
    cri.remove(container)
    cri.stop_pod(pod)
    assert cri.pod_status(pod).state == pb.SANDBOX_NOTREADY
    cri.remove_pod(pod)
    assert not cri.pods()
    assert not cri.containers()


@NETWORKS
def test_wasm_pod(lab: Lab, network: pb.NamespaceMode.ValueType) -> None:
    pod = lab.pod("wasm", network=network)
    container = lab.cri.run(pod, container_config(lab.wasm, args=["one", "two"], env={"KEY": "value"}))
    status = lab.cri.wait_exit(container)
    assert (status.exit_code, status.reason) == (0, "Completed")
    assert any("KEY=value" in line.text for line in lab.cri.log(container))
    lab.cri.remove_pod(pod)


@pytest.mark.parametrize(("code", "reason"), [(0, "Completed"), (7, "Error"), (255, "Error")])
def test_exit_codes(lab: Lab, code: int, reason: str) -> None:
    container = lab.cri.run(lab.pod("crun"), lab.shell(f"exit {code}"))
    status = lab.cri.wait_exit(container)
    assert (status.exit_code, status.reason, status.message) == (code, reason, "")


def test_stop_and_remove_are_idempotent(lab: Lab) -> None:
    cri = lab.cri
    unknown = "ab" * 32
    cri.stop(unknown)
    cri.remove(unknown)
    cri.stop_pod(unknown)
    cri.remove_pod(unknown)
    pod = lab.pod("crun")
    container = cri.run(pod, lab.shell("exec sleep 1000"))
    for _ in range(2):
        cri.stop(container)
        cri.stop_pod(pod)
    for _ in range(2):
        cri.remove(container)
        cri.remove_pod(pod)


def test_equal_requests_get_the_same_pod_and_container(lab: Lab) -> None:
    config = lab.pod_config()
    pod = lab.pod("crun", config=config)
    assert lab.pod("crun", config=config).id == pod.id
    container = lab.cri.create(pod, lab.shell("true"))
    assert lab.cri.create(pod, lab.shell("true")) == container
    with pytest.raises(grpc.RpcError) as caught:
        lab.cri.create(pod, lab.shell("false"))
    assert fault(caught.value)[0] is grpc.StatusCode.ALREADY_EXISTS
    assert "different configuration" in fault(caught.value)[1]
    other = pb.PodSandboxConfig()
    other.CopyFrom(config)
    other.labels["x"] = "y"
    with pytest.raises(grpc.RpcError) as caught:
        lab.pod("crun", config=other)
    assert fault(caught.value)[0] is grpc.StatusCode.ALREADY_EXISTS


def test_lists_filter_by_every_field(lab: Lab) -> None:
    cri = lab.cri
    one, two = lab.pod("crun"), lab.pod("crun")
    mine = cri.run(one, container_config(lab.busybox, "sleep", "1000", labels={"app": "x"}))
    cri.create(two, lab.shell("true"))

    def containers(**fields: object) -> list[str]:
        request = pb.ListContainersRequest(filter=pb.ContainerFilter(**fields))  # type: ignore[arg-type]
        return [container.id for container in cri.runtime.ListContainers(request).containers]

    assert len(containers()) == 2
    assert containers(id=mine[:12]) == [mine]
    assert containers(pod_sandbox_id=one.id) == [mine]
    assert containers(label_selector={"app": "x"}) == [mine]
    assert containers(label_selector={"app": "y"}) == []
    assert containers(state=pb.ContainerStateValue(state=pb.CONTAINER_RUNNING)) == [mine]
    assert containers(id="nothing") == []

    def pods(**fields: object) -> list[str]:
        request = pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(**fields))  # type: ignore[arg-type]
        return [pod.id for pod in cri.runtime.ListPodSandbox(request).items]

    assert sorted(pods()) == sorted([one.id, two.id])
    assert pods(id=two.id[:10]) == [two.id]
    cri.stop_pod(two)
    assert pods(state=pb.PodSandboxStateValue(state=pb.SANDBOX_READY)) == [one.id]


def test_ids_may_be_shortened(lab: Lab) -> None:
    pod = lab.pod("crun")
    container = lab.cri.create(pod, lab.shell("true"))
    assert lab.cri.status(container[:10]).id == container
    assert lab.cri.pod_status(pod.id[:10]).id == pod.id


def test_reopened_logs_go_to_a_new_file(lab: Lab) -> None:
    pod = lab.pod("crun")
    container = lab.cri.run(pod, lab.shell("while :; do echo tick; sleep 0.05; done"))
    lab.cri.wait_log(container, "tick")
    path = lab.daemon.pod_logs / pod.config.metadata.name / "main" / "0.log"
    old = path.with_suffix(".old")
    path.rename(old)
    lab.cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container))
    size = old.stat().st_size
    lab.cri.wait_log(container, "tick")
    assert old.stat().st_size == size
    assert path.stat().st_mode & 0o777 == 0o640
    lab.cri.stop(container)
    with pytest.raises(grpc.RpcError) as caught:
        lab.cri.runtime.ReopenContainerLog(pb.ReopenContainerLogRequest(container_id=container))
    assert fault(caught.value)[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_exec_deadline_kills_the_whole_tree(lab: Lab) -> None:
    pod = lab.pod("crun")
    container = lab.cri.run(pod, lab.shell("exec sleep 1000"))
    with pytest.raises(grpc.RpcError) as caught:
        lab.cri.exec(container, ["sh", "-c", "sleep 777 & sleep 777; true"], within=1)
    assert fault(caught.value)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    listed = lab.cri.exec(container, ["ps"]).stdout
    assert b"777" not in listed


def test_an_oom_kill_is_told(lab: Lab) -> None:
    pod = lab.pod("crun")
    config = lab.shell("dd if=/dev/zero of=/dev/null bs=100M count=10")
    config.linux.resources.memory_limit_in_bytes = 20 << 20
    container = lab.cri.run(pod, config)
    status = lab.cri.wait_exit(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
