"""Exec, logs and stop of Linux containers: what passes between a process and its daemon while it runs.

Not what the process is given at its start (`test_semantics`).
"""

from __future__ import annotations

import itertools
import time

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import images
from tests.support.cri import container_config, whole_lines
from tests.support.expect import eventually, refused

pytestmark = [pytest.mark.root, pytest.mark.parametrize("handler", ["runc", "crun"])]


def test_exec_is_like_the_first_process(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    config = container_config(lab.busybox, "sleep", "1000")
    config.working_dir = "/home"
    config.envs.add(key="KEY", value=b"value")
    config.linux.resources.oom_score_adj = 500
    security = config.linux.security_context
    security.run_as_user.value, security.run_as_group.value = 1234, 4321
    security.supplemental_groups.extend([77, 88])
    security.no_new_privs = True
    security.capabilities.drop_capabilities.append("NET_RAW")
    security.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
    container = lab.cri.run(lab.pod(handler), config)
    script = """
        readlink /proc/$1/cwd; cd /proc/$1; for kind in pid net mnt ipc uts; do readlink ns/$kind; done
        grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:)' status; cat oom_score_adj cgroup"""
    first, further = (lab.cri.exec(container, ["sh", "-c", script, "sh", pid]).stdout for pid in ("1", "self"))
    assert b"\n500\n" in first
    assert first == further
    environment = lab.cri.exec(container, ["cat", "/proc/1/environ"]).stdout.rstrip(b"\0").split(b"\0")
    assert b"KEY=value" in environment
    assert lab.cri.exec(container, ["env"]).stdout.splitlines() == environment
    code = lab.cri.exec(container, ["sh", "-c", "tty; cat; kill -9 $$"])
    assert (code.stdout, code.exit_code) == (b"not a tty\n", 137)


def test_exec_refusals(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.create(lab.pod(handler), lab.shell("exec sleep 1000"))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not running"):
        lab.cri.exec(container, ["true"])
    lab.cri.start(container)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "cmd"):
        lab.cri.exec(container, [])
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not-there"):
        lab.cri.exec(container, ["not-there"])
    lab.cri.stop(container)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "not running"):
        lab.cri.exec(container, ["true"])


def test_exec_output_has_a_limit_and_the_command_goes_on(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.run(lab.pod(handler), lab.shell("exec sleep 1000"))
    both = "yes out | head -c 3000000; yes err | head -c 2000000 >&2; exit 7"
    answer = lab.cri.exec(container, ["sh", "-c", both])
    assert (len(answer.stdout), len(answer.stderr), answer.exit_code) == (3_000_000, 2_000_000, 7)
    assert set(answer.stdout.split(b"\n")[:-1]) == {b"out"}
    answer = lab.cri.exec(container, ["sh", "-c", "head -c 20000000 /dev/zero; touch /over; exit 8"])
    assert (10 << 20) < len(answer.stdout) <= (16 << 20)
    assert answer.exit_code == 8
    assert lab.cri.exec(container, ["test", "-e", "/over"]).exit_code == 0


def test_exec_does_not_wait_for_a_daemon_that_keeps_its_output(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.run(lab.pod(handler), lab.shell("exec sleep 1000"))
    begin = time.monotonic()
    answer = lab.cri.exec(container, ["sh", "-c", "sleep 987 & echo started"], within=0)
    assert time.monotonic() - begin < 30
    assert (answer.stdout, answer.exit_code) == (b"started\n", 0)
    # It was not asked to end: it is the container's now, and goes with it.
    assert b"sleep 987" in lab.cri.exec(container, ["ps"]).stdout


def test_terminal(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    config = lab.shell("test -t 0 && test -t 1 && test -t 2 && tty; echo $TERM; echo error >&2; stat -c %a $(tty)")
    config.tty = config.stdin = True
    container = lab.cri.run(lab.pod(handler), config)
    assert lab.cri.wait_exit(container).exit_code == 0
    lines = lab.cri.log(container)
    # A terminal hands over what it has: the log may hold a line in pieces, even its CR and LF apart.
    text = "".join(line.text + ("" if line.partial else "\n") for line in lines)
    assert text.replace("\r", "").splitlines() == ["/dev/pts/0", "xterm", "error", "620"]
    assert {line.stream for line in lines} == {"stdout"}


def test_long_and_unfinished_lines(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    script = "head -c 40000 /dev/zero | tr '\\0' x; echo end; echo; printf 'no newline'"
    container = lab.cri.run(lab.pod(handler), lab.shell(script))
    assert lab.cri.wait_exit(container).exit_code == 0
    lines = lab.cri.log(container)
    first = next(index for index, line in enumerate(lines) if not line.partial)
    assert "".join(line.text for line in lines[: first + 1]) == "x" * 40000 + "end"
    assert all(len(line.text) <= 16 << 10 for line in lines)
    assert [(line.text, line.partial) for line in lines[first + 1 :]] == [("", False), ("no newline", True)]


def test_a_flood_of_lines_keeps_its_order(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    container = lab.cri.run(lab.pod(handler), lab.shell("seq 50000; seq 50000 >&2"))
    assert lab.cri.wait_exit(container).exit_code == 0
    lines = lab.cri.log(container)
    for stream in ("stdout", "stderr"):
        found = whole_lines([line for line in lines if line.stream == stream])
        assert found == [str(number) for number in range(1, 50001)]
    assert all(before.time <= after.time for before, after in itertools.pairwise(lines))


def test_without_a_log_path_output_is_dropped(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    sandbox = lab.pod_config()
    sandbox.log_directory = ""
    container = lab.cri.run(lab.pod(handler, config=sandbox), lab.shell("seq 50000; exit 3"))
    status = lab.cri.wait_exit(container)
    assert (status.exit_code, status.log_path) == (3, "")


def test_stop_signals(shared_lab: Lab, registry: images.Registry, handler: str) -> None:
    lab = shared_lab
    busybox = images.busybox_image()
    image = registry.push("io/stop:1", images.image(busybox.blobs[1:], {"StopSignal": "SIGUSR1", "Env": ["PATH=/bin"]}))
    lab.cri.pull(image)
    pod = lab.pod(handler)
    script = (
        'for name in TERM USR1 USR2; do trap "echo $name; exit 9" $name; done; echo ready; while :; do sleep 0.05; done'
    )
    default, asked = pb.SIGNAL_RUNTIME_DEFAULT, pb.SIGNAL_SIGUSR2
    for number, (reference, wanted, told, name) in enumerate(
        [
            (lab.busybox, default, pb.SIGNAL_SIGTERM, "TERM"),
            (image, default, pb.SIGNAL_SIGUSR1, "USR1"),
            (image, asked, asked, "USR2"),
        ]
    ):
        config = container_config(reference, "sh", "-c", f"{script}", name=f"c{number}")
        config.stop_signal = wanted
        container = lab.cri.run(pod, config)
        assert lab.cri.status(container).stop_signal == told
        lab.cri.wait_log(container, "ready")
        begin = time.monotonic()
        lab.cri.stop(container, grace=30)
        assert time.monotonic() - begin < 25
        status = lab.cri.status(container)
        assert (status.state, status.exit_code) == (pb.CONTAINER_EXITED, 9)
        assert whole_lines(lab.cri.log(container)) == ["ready", name]


def test_a_first_process_that_ignores_the_signal_is_killed_after_the_grace(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    # A shell without a trap is such a process: the kernel spares the first of a PID namespace.
    container = lab.cri.run(pod, lab.shell("while :; do sleep 1000; done"))
    begin = time.monotonic()
    lab.cri.stop(container, grace=1)
    assert time.monotonic() - begin >= 1
    status = lab.cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 137, "Error")
    lab.cri.stop(container, grace=1)


def test_a_shorter_grace_wins_over_a_longer_one(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    container = lab.cri.run(pod, lab.shell("trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done"))
    lab.cri.wait_log(container, "ready")
    request = pb.StopContainerRequest(container_id=container, timeout=50)
    patient = lab.cri.runtime.StopContainer.future(request, timeout=60)
    lab.cri.wait_log(container, "asked")
    begin = time.monotonic()
    lab.cri.stop(container, grace=1)
    assert time.monotonic() - begin < 30
    patient.result(30)
    assert whole_lines(lab.cri.log(container)) == ["ready", "asked"]


def test_an_exec_ends_with_its_container(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    container = lab.cri.run(pod, lab.shell("exec sleep 1000"))
    request = pb.ExecSyncRequest(container_id=container, cmd=["sh", "-c", "echo begun; sleep 876; true"])
    running = lab.cri.runtime.ExecSync.future(request, timeout=110)
    eventually(lambda: b"sleep 876" in lab.cri.exec(container, ["ps"]).stdout)
    lab.cri.stop(container)
    answer = running.result(60)
    assert (answer.stdout, answer.exit_code) == (b"begun\n", 137)


def test_an_exec_ends_when_its_client_leaves(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    container = lab.cri.run(pod, lab.shell("exec sleep 1000"))
    request = pb.ExecSyncRequest(container_id=container, cmd=["sh", "-c", "sleep 876 & sleep 876; true"])
    running = lab.cri.runtime.ExecSync.future(request, timeout=110)
    eventually(lambda: lab.cri.exec(container, ["ps"]).stdout.count(b"sleep 876") == 4)
    running.cancel()
    eventually(lambda: b"sleep 876" not in lab.cri.exec(container, ["ps"]).stdout)


def test_many_at_once(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    container = lab.cri.run(pod, lab.shell("exec sleep 1000"))
    calls = [
        lab.cri.runtime.ExecSync.future(
            pb.ExecSyncRequest(container_id=container, cmd=["sh", "-c", f"echo {number}; exit {number}"]), timeout=60
        )
        for number in range(20)
    ]
    answers = [call.result() for call in calls]
    assert [(answer.stdout, answer.exit_code) for answer in answers] == [(b"%d\n" % n, n) for n in range(20)]
