"""Pods with user namespaces on cgroup v2, with both cgroup drivers and Debian 13's own crun.

What does not depend on the cgroup version is in `tests/e2e/test_userns.py`, which runs in that machine too.
"""

from __future__ import annotations

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.e2e.test_userns import FIRST, LENGTH, ids_of, pid_of, pod_config
from tests.support.cri import whole_lines
from tests.support.expect import eventually, refused

pytestmark = [pytest.mark.root, pytest.mark.vm]


@pytest.mark.parametrize("pid", [pb.CONTAINER, pb.POD])
def test_limits_and_figures(lab: Lab, pid: pb.NamespaceMode.ValueType) -> None:
    pod = lab.pod("crun", config=pod_config(lab, pid=pid))
    script = """
        tr -s ' ' </proc/self/uid_map; cat /proc/self/cgroup /sys/fs/cgroup/memory.max
        mkdir /sys/fs/cgroup/own 2>/dev/null || echo read-only; echo again >/dev/stdout; exec sleep 1000"""
    config = lab.shell(script)
    config.linux.security_context.namespace_options.pid = pid
    config.linux.resources.memory_limit_in_bytes = 64 << 20
    container = lab.cri.run(pod, config)
    lines = whole_lines(lab.cri.wait_log(container, "again", within=60))
    assert lines == [f" 0 {FIRST} {LENGTH}", "0::/", str(64 << 20), "read-only", "again"]
    assert ids_of(pid_of(lab, container)) == (FIRST, FIRST)
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=96 << 20)
    lab.cri.runtime.UpdateContainerResources(pb.UpdateContainerResourcesRequest(container_id=container, linux=limits))
    said = lab.cri.exec(container, ["cat", "/sys/fs/cgroup/memory.max"], within=60)
    assert said.stdout == b"%d\n" % (96 << 20)
    request = pb.ContainerStatsRequest(container_id=container)
    eventually(lambda: lab.cri.runtime.ContainerStats(request).stats.memory.working_set_bytes.value > 0, within=60)
    lab.cri.stop(container)
    assert lab.cri.status(container).state == pb.CONTAINER_EXITED


def test_an_oom_kill_is_told(lab: Lab) -> None:
    config = lab.shell("dd if=/dev/zero of=/dev/null bs=64M")
    config.linux.resources.memory_limit_in_bytes = 16 << 20
    container = lab.cri.run(lab.pod("crun", config=pod_config(lab)), config)
    status = lab.cri.wait_exit(container, within=60)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


def test_the_machines_runc_is_not_able(lab: Lab) -> None:
    answer = lab.cri.runtime.Status(pb.StatusRequest())
    features = {handler.name: handler.features.user_namespaces for handler in answer.runtime_handlers}
    assert (features["crun"], features["runc"]) == (True, False)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "userns_options: handler 'runc' is not able to: runc 1.1"):
        lab.pod("runc", config=pod_config(lab))
