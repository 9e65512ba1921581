"""The IPC namespace and /dev/shm that a pod of modules gets later: made whole, whatever an earlier attempt has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.adapters import sandbox
from cri_shim.kernel import mounts
from cri_shim.model.handler import Kind, PodContext
from cri_shim.model.ids import PodId
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.dispatch import HandlerRules
from cri_shim.spec.pod import context, plan_sandbox
from tests.support.cri import pod_config

pytestmark = pytest.mark.root

POD = PodId("a" * 64)
NODE = NodeFacts(hostname="node", boot_id="b", root=True)
MEBIBYTE = 1 << 20


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout = Layout(root=tmp_path / "root", state=tmp_path / "state")
    yield layout
    sandbox.remove(layout, POD)
    assert not layout.pod(POD).exists()
    assert not [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(tmp_path)]


def make(layout: Layout, ipc: pb.NamespaceMode.ValueType = pb.POD) -> PodContext:
    """A pod of modules on the node's network."""
    config = pod_config(network=pb.NODE)
    config.linux.security_context.namespace_options.ipc = ipc
    if ipc != pb.NODE:
        config.annotations["cri-shim.io/shm-size"] = "3Mi"
    rules = HandlerRules("wasm", Kind.WASM, allowed_annotations=("shm-size",))
    sandbox.make(layout, POD, plan_sandbox(config, NODE, rules), None, root=True)
    return context(POD, config, layout, NODE, "")


def is_whole(pod: PodContext) -> bool:
    assert pod.ipc is not None
    size = os.statvfs(pod.shm)
    return mounts.is_mount_point(pod.ipc) and size.f_blocks * size.f_frsize == 3 * MEBIBYTE


def test_it_costs_no_mount_before_it_is_wanted(layout: Layout) -> None:
    pod = make(layout)
    assert not [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(layout.state)]
    assert not pod.shm.exists()
    sandbox.make_ipc(pod)
    assert is_whole(pod)
    assert pod.shm.stat().st_mode & 0o7777 == 0o1777


def test_it_is_made_once(layout: Layout) -> None:
    pod = make(layout)
    sandbox.make_ipc(pod)
    assert pod.ipc is not None
    before = pod.ipc.stat().st_ino
    (pod.shm / "kept").touch()
    sandbox.make_ipc(pod)
    assert pod.ipc.stat().st_ino == before
    assert (pod.shm / "kept").exists()


def test_the_nodes_own_is_shown_where_it_is_asked_for(layout: Layout) -> None:
    pod = make(layout, pb.NODE)
    sandbox.make_ipc(pod)
    assert pod.ipc is None
    assert pod.shm.stat().st_dev == os.stat("/dev/shm").st_dev


@pytest.mark.parametrize("step", ["bind", "tmpfs"])
def test_a_step_that_fails_is_made_up_for(layout: Layout, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    pod = make(layout)

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(step)

    with monkeypatch.context() as patch:
        patch.setattr(mounts, step, fail)
        with pytest.raises(OSError, match=step):
            sandbox.make_ipc(pod)
    sandbox.make_ipc(pod)
    assert is_whole(pod)


@pytest.mark.parametrize("shm", [False, True])
def test_what_a_killed_daemon_has_left_is_completed(layout: Layout, shm: bool) -> None:
    """The place of the pin, without what is to be pinned there; likewise that of /dev/shm."""
    pod = make(layout)
    assert pod.ipc is not None
    pod.ipc.parent.mkdir(mode=0o700)
    pod.ipc.touch(mode=0o400)
    if shm:
        pod.shm.mkdir()
    sandbox.make_ipc(pod)
    assert is_whole(pod)
