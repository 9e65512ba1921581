"""How containers end, told truly: out of memory, by force against whatever resists, and before they ever ran.

Not the plain cases: exit codes (`test_lifecycle`), stop signals and the grace period (`test_process_io`).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import images, leftovers
from tests.support.cri import Pod, container_config
from tests.support.expect import eventually, refused
from tests.support.scale import count

pytestmark = [pytest.mark.root, pytest.mark.parametrize("handler", ["runc", "crun"])]

MEMORY = 20 << 20
GREEDY = ("dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=10")
BOMB = "awk 'BEGIN { while (1) system(\"sh /bomb &\") }'"
"""Whatever the kernel refuses it, it goes on: for each one that is ended there is another at once."""
BOMB_LIMIT = 100

_names = itertools.count()


def limited(lab: Lab, *command: str) -> pb.ContainerConfig:
    config = container_config(lab.busybox, *command, name=f"c{next(_names)}")
    config.linux.resources.memory_limit_in_bytes = MEMORY
    return config


def end_of(lab: Lab, pod: Pod, config: pb.ContainerConfig) -> tuple[int, str]:
    """Exit code and reason as the first answer that says EXITED has them: a reason may not come later."""
    container = lab.cri.run(pod, config)
    status = lab.cri.wait_exit(container)
    lab.cri.remove(container)
    return status.exit_code, status.reason


def first_pid(lab: Lab, container: str) -> int:
    """The container's first process, as the node counts."""
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    return int(json.loads(lab.cri.runtime.ContainerStatus(request).info["info"])["pid"])


def processes_in(cgroup: str) -> set[int]:
    """The processes in a cgroup and below it, in whatever hierarchy."""
    return {
        int(pid)
        for root in (leftovers.CGROUPS, *leftovers.CGROUPS.iterdir())
        for file in (root / cgroup.strip("/")).glob("**/cgroup.procs")
        for pid in file.read_text().split()
    }


def members(lab: Lab, container: str) -> set[int]:
    return processes_in(f"{lab.daemon.cgroup_parent}/{container}")


@pytest.mark.timeout(600)
def test_running_out_of_memory_is_never_missed(shared_lab: Lab, handler: str) -> None:
    """By the first process, and by a child whose end the first one passes on; several at once, as on a busy node."""
    lab, pod = shared_lab, shared_lab.pod(handler)
    kinds = (GREEDY, ("sh", "-c", f"{' '.join(GREEDY)}; exit $?"))
    configs = [limited(lab, *kinds[number % 2]) for number in range(count(full=200, quick=20))]
    with ThreadPoolExecutor(max_workers=4) as pool:
        ends = list(pool.map(lambda config: end_of(lab, pod, config), configs))
    assert ends == [(137, "OOMKilled")] * len(configs)


def test_an_end_that_is_not_for_want_of_memory(shared_lab: Lab, handler: str) -> None:
    """Only what ends by SIGKILL ends by the OOM killer, and not all that ends by SIGKILL."""
    lab, pod = shared_lab, shared_lab.pod(handler)
    greedy = " ".join(GREEDY)
    assert end_of(lab, pod, limited(lab, "sh", "-c", f"{greedy}; exit 0")) == (0, "Completed")
    assert end_of(lab, pod, limited(lab, "sh", "-c", f"{greedy}; exit 3")) == (3, "Error")
    assert end_of(lab, pod, limited(lab, "sh", "-c", "exit 137")) == (137, "Error")
    container = lab.cri.run(pod, limited(lab, "sleep", "1000"))
    os.kill(first_pid(lab, container), signal.SIGKILL)
    status = lab.cri.wait_exit(container)
    assert (status.exit_code, status.reason) == (137, "Error")


def test_a_restart_of_the_daemon_does_not_hide_the_cause(lab: Lab, handler: str) -> None:
    pod = lab.pod(handler)
    script = f"while ! test -e /go; do sleep 0.05; done; exec {' '.join(GREEDY)}"
    container = lab.cri.run(pod, limited(lab, "sh", "-c", script))
    go = Path(f"/proc/{first_pid(lab, container)}/root/go")
    lab.daemon.kill()
    go.touch()
    eventually(lambda: not members(lab, container))
    lab.daemon.start()
    with lab.daemon.client() as again:
        status = again.wait_exit(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


def stopped_within(lab: Lab, container: str, grace: int) -> float:
    """Seconds that StopContainer took. The container is EXITED then, and none of its processes is left."""
    begin = time.monotonic()
    lab.cri.stop(container, grace)
    took = time.monotonic() - begin
    status = lab.cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 137, "Error")
    assert not members(lab, container)
    return took


def test_stop_of_processes_that_ignore_signals(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    script = "trap '' TERM HUP INT; (while :; do sleep 1000; done) & echo deaf; while :; do sleep 1000; done"
    container = lab.cri.run(pod, lab.shell(script))
    lab.cri.wait_log(container, "deaf")
    assert 1 <= stopped_within(lab, container, 1) < 30


def test_stop_of_a_process_that_is_stopped(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    container = lab.cri.run(pod, lab.shell("trap 'exit 5' TERM; while :; do sleep 1000; done"))
    pid = first_pid(lab, container)
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text())
    assert 1 <= stopped_within(lab, container, 1) < 30


def test_stop_of_a_frozen_container(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    container = lab.cri.run(pod, lab.shell("while :; do sleep 1000; done"))
    cgroup = f"{lab.daemon.cgroup_parent}/{container}".strip("/")
    v1 = leftovers.CGROUPS / "freezer" / cgroup / "freezer.state"
    if v1.exists():
        v1.write_text("FROZEN")
        eventually(lambda: v1.read_text() == "FROZEN\n")
    else:
        (leftovers.CGROUPS / cgroup / "cgroup.freeze").write_text("1")
    assert stopped_within(lab, container, 0) < 30


@contextmanager
def pod_cgroup(lab: Lab, limit: int) -> Iterator[str]:
    """A pod's cgroup as the kubelet makes one, in which no more than `limit` processes fit."""
    name = f"{lab.daemon.cgroup_parent}/limited"
    pids = leftovers.CGROUPS / "pids"
    directory = (pids if pids.is_dir() else leftovers.CGROUPS) / name.strip("/")
    directory.mkdir(parents=True)
    (directory / "pids.max").write_text(str(limit))
    try:
        yield name
    finally:
        lab.cri.remove_all_pods()
        leftovers.remove_cgroup(name)


@pytest.mark.parametrize("pid", [pb.CONTAINER, pb.POD], ids=["own-pids", "shared-pids"])
def test_stop_of_a_fork_bomb(shared_lab: Lab, handler: str, pid: pb.NamespaceMode.ValueType) -> None:
    """In a shared PID namespace the kernel does not end the others with the first: they have to be caught."""
    lab = shared_lab
    with pod_cgroup(lab, BOMB_LIMIT) as cgroup:
        sandbox = lab.pod_config(pid=pid)
        sandbox.linux.cgroup_parent = cgroup
        pod = lab.pod(handler, config=sandbox)
        script = 'echo "$BOMB" >/bomb; mkfifo /wait; sh /bomb 2>/dev/null & read line <>/wait'
        container = lab.cri.run(pod, container_config(lab.busybox, "sh", "-c", script, env={"BOMB": BOMB}, pid=pid))
        place = f"{cgroup}/{container}"
        eventually(lambda: len(processes_in(place)) > BOMB_LIMIT // 2)
        begin = time.monotonic()
        lab.cri.stop(container)
        assert time.monotonic() - begin < 30
        assert lab.cri.status(container).exit_code == 137
        assert not processes_in(place)
        lab.cri.remove_pod(pod)
        assert not processes_in(cgroup)


def test_children_that_outlive_the_first_process(shared_lab: Lab, handler: str) -> None:
    """In a shared PID namespace they can: they go all the same when the first one ends, by itself or by force."""
    lab, pod = shared_lab, shared_lab.pod(handler, pid=pb.POD)
    children = "trap '' TERM; for n in 1 2 3; do setsid sleep 1000 & done; echo started"
    for script, grace, code in ((f"{children}; exit 4", None, 4), (f"{children}; read line", 1, 137)):
        config = container_config(lab.busybox, "sh", "-c", script, name=f"ends-{code}", pid=pb.POD)
        config.stdin = True
        container = lab.cri.run(pod, config)
        lab.cri.wait_log(container, "started")
        if grace is not None:
            assert len(members(lab, container)) == 4
            lab.cri.stop(container, grace)
        assert lab.cri.wait_exit(container).exit_code == code
        assert not members(lab, container)


def test_remove_while_it_is_being_stopped(shared_lab: Lab, handler: str) -> None:
    """The removal does not wait for the grace that another call has given, and that call succeeds too."""
    lab, pod = shared_lab, shared_lab.pod(handler)
    container = lab.cri.run(pod, lab.shell("trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done"))
    lab.cri.wait_log(container, "ready")
    patient = lab.cri.runtime.StopContainer.future(
        pb.StopContainerRequest(container_id=container, timeout=50), timeout=60
    )
    lab.cri.wait_log(container, "asked")
    begin = time.monotonic()
    lab.cri.remove(container)
    assert time.monotonic() - begin < 30
    patient.result(30)
    assert container not in [listed.id for listed in lab.cri.containers()]
    with refused(grpc.StatusCode.NOT_FOUND):
        lab.cri.status(container)


def other_machine(program: bytes) -> bytes:
    """The same ELF file for a machine that is not there (e_machine, two bytes at offset 18)."""
    return program[:18] + b"\xfe\xca" + program[20:]


def test_programs_that_cannot_be_started(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    """What the kernel refuses to execute ends EXITED, 128, StartError, with the cause and what to do about it."""
    lab = shared_lab
    busybox = images.busybox_image()
    layer = images.layer(
        [
            images.file("bin/garbage", b"\x01\x02\x03\x04 no program", 0o755),
            images.file("bin/foreign", other_machine(Path("/bin/busybox").read_bytes()), 0o755),
            images.file("bin/lost", b"#!/no/such/interpreter\n", 0o755),
        ]
    )
    image = registry.push("truth/broken:1", images.image([*busybox.blobs[1:], layer], {"Env": ["PATH=/bin"]}))
    lab.cri.pull(image)
    pod = lab.pod(handler)
    for program, words in (
        ("garbage", "a Wasm module needs a RuntimeClass of a Wasm handler"),
        ("foreign", "/bin/foreign is for another CPU"),
        ("lost", "the interpreter of its first line"),
    ):
        container = lab.cri.create(pod, container_config(image, f"/bin/{program}", name=program))
        with pytest.raises(grpc.RpcError) as caught:
            lab.cri.start(container)
        status = lab.cri.status(container)
        assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
        assert status.started_at == status.finished_at > status.created_at
        assert words.lower() in status.message.lower()
        assert status.message in str(caught.value)
        lab.cri.stop(container)
        lab.cri.remove(container)
    # What is not there at all is known before: nothing of it is left.
    for program in ("missing", "/bin/missing"):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, f"the image has no {program}"):
            lab.cri.create(pod, container_config(image, program, name="missing"))
    assert not lab.cri.containers()
