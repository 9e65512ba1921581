"""SELinux labels as a process sees them, on a machine whose kernel labels; elsewhere these tests are skipped."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from cri_shim.kernel import selinux
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.selinux import parse_contexts
from tests.e2e.conftest import Lab
from tests.support.cri import Pod
from tests.support.expect import refused

pytestmark = [
    pytest.mark.root,
    pytest.mark.parametrize("handler", ["runc", "crun"]),
    pytest.mark.skipif(not selinux.is_enabled(), reason="the kernel of this machine does not label (SELinux is off)"),
]

Adjust = Callable[[pb.ContainerConfig], None]
LABEL = "tr -d '\\0' </proc/self/attr/current; echo"
OWN_LEVEL = re.compile(r":container_t:s0:c\d+,c\d+$")


def process_label(lab: Lab, pod: Pod, ask: Adjust = lambda config: None, name: str = "main") -> str:
    (label,) = lab.say(pod, LABEL, ask, name=name)
    return label


def label_of(path: Path) -> str:
    return os.getxattr(path, "security.selinux").decode().rstrip("\0")


def options(**fields: str) -> Adjust:
    def ask(config: pb.ContainerConfig) -> None:
        config.linux.security_context.selinux_options.CopyFrom(pb.SELinuxOption(**fields))

    return ask


def test_the_policy_has_contexts_for_containers(handler: str) -> None:
    assert parse_contexts(selinux.container_contexts()) is not None


def test_every_pod_has_a_level_and_its_containers_share_it(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    first = process_label(lab, pod, name="first")
    assert OWN_LEVEL.search(first)
    assert process_label(lab, pod, name="second") == first
    assert process_label(lab, lab.pod(handler)) != first


def test_files_have_the_level_of_the_pod(shared_lab: Lab, handler: str, tmp_path: Path) -> None:
    lab = shared_lab
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "file").write_text("x")

    def ask(config: pb.ContainerConfig) -> None:
        config.mounts.add(host_path=str(volume), container_path="/data", selinux_relabel=True)
        image = pb.ImageSpec(image=lab.busybox)
        config.mounts.add(container_path="/image", image=image, readonly=True)

    pod = lab.pod(handler)
    places = '$5 == "/" || $5 == "/image" || $5 == "/dev/shm"'
    label, *mounted = lab.say(pod, f"{LABEL}; awk '{places}' /proc/self/mountinfo", ask)
    expected = f":object_r:container_file_t:{label.split(':', 3)[3]}"
    assert len(mounted) == 3
    for line in mounted:
        assert f'{expected}"' in line, line
    for path in (volume, volume / "file", lab.daemon.state / "pods" / pod.id / "hosts"):
        assert label_of(path).endswith(expected)
    config = lab.shell("true", name="refused")
    config.mounts.add(host_path="/etc", container_path="/data", selinux_relabel=True)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "selinux_relabel of /data: /etc belongs to the node"):
        lab.cri.create(pod, config)


def test_options(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    assert process_label(lab, pod, options(level="s0:c4,c5")).endswith(":container_t:s0:c4,c5")
    assert process_label(lab, pod, options(level="s0"), name="low").endswith(":container_t:s0")
    for number, wrong in enumerate(({"level": "s0,c4,c5"}, {"type": "no_such_t"}, {"user": "nobody_u"})):
        config = lab.shell("true", name=f"wrong{number}")
        options(**wrong)(config)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "selinux_options"):
            lab.cri.create(pod, config)
    sandbox = lab.pod_config()
    sandbox.linux.security_context.selinux_options.level = "s0:c7,c8"
    assert process_label(lab, lab.pod(handler, config=sandbox)).endswith(":container_t:s0:c7,c8")
    sandbox = lab.pod_config()
    sandbox.linux.security_context.selinux_options.level = "s0,c7"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "selinux_options"):
        lab.pod(handler, config=sandbox)


def test_a_privileged_container_is_not_confined(shared_lab: Lab, handler: str) -> None:
    lab, sandbox = shared_lab, shared_lab.pod_config()
    sandbox.linux.security_context.privileged = True

    def ask(config: pb.ContainerConfig) -> None:
        config.linux.security_context.privileged = True

    assert ":container_t:" not in process_label(lab, lab.pod(handler, config=sandbox), ask)


def test_further_processes_and_the_infra_container(shared_lab: Lab, handler: str) -> None:
    lab = shared_lab
    pod = lab.pod(handler, pid=pb.POD)
    config = lab.shell("echo up; exec sleep 1000")
    config.linux.security_context.namespace_options.pid = pb.POD
    container = lab.cri.run(pod, config)
    lab.cri.wait_log(container, "up")
    script = "tr -d '\\0' </proc/1/attr/current; echo; " + LABEL
    first, further = lab.cri.exec(container, ["sh", "-c", script]).stdout.decode().splitlines()
    assert first == further
    assert OWN_LEVEL.search(first)
