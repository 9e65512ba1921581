"""Where a module runs, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from cri_shim.model.container import User
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import ContainerPlan, PodContext, ProcessPlan
from cri_shim.model.ids import new_container_id, new_pod_id
from cri_shim.pb import api_pb2 as pb
from handlers.wasmtime.guest_spec import Preopen
from handlers.wasmtime.placement import MOST_DESCRIPTION, MOST_READERS, Isolation, place

KEY = "cri-shim.io/isolation"
IN, OUT = Isolation.IN_PROCESS, Isolation.PROCESS
OWN = Preopen("/rootfs", "/", readonly=True, host_backed=False)
WRITABLE = Preopen("/rootfs", "/", readonly=False, host_backed=False)
VOLUME = Preopen("/var/data", "/data", readonly=True, host_backed=True)
DROPPED = pb.Capability(drop_capabilities=["ALL"])


def plan(
    uid: int = 0, *, of_pod: str = "", of_container: str = "", capabilities: pb.Capability | None = None
) -> ContainerPlan:
    config = pb.ContainerConfig(annotations={KEY: of_container} if of_container else {})
    config.linux.security_context.capabilities.CopyFrom(capabilities or pb.Capability())
    nowhere = Path("/nowhere")
    pod = PodContext(
        id=new_pod_id(),
        config=pb.PodSandboxConfig(annotations={KEY: of_pod} if of_pod else {}),
        hostname="pod",
        cgroup_parent="",
        net=None,
        ipc=None,
        uts=None,
        pid=None,
        shm=nowhere,
        resolv_conf=nowhere,
        hosts=nowhere,
        hostname_file=nowhere,
    )
    return ContainerPlan(
        id=new_container_id(),
        pod=pod,
        config=config,
        process=ProcessPlan(args=("m",), env=(), cwd="/", user=User(uid=uid)),
        image=None,
        rootfs=None,
        bundle=nowhere,
        log_path=None,
        stop_signal=15,
    )


@pytest.mark.parametrize(
    ("asked", "option", "isolation", "why"),
    [
        (plan(), IN, IN, "option"),
        (plan(), OUT, OUT, "option"),
        (plan(of_pod="process"), IN, OUT, "pod's annotation"),
        (plan(of_pod="process", of_container="in-process"), IN, IN, "container's annotation"),
        (plan(of_pod="in-process"), OUT, IN, "pod's annotation"),
    ],
)
def test_the_nearest_word_counts(asked: ContainerPlan, option: Isolation, isolation: Isolation, why: str) -> None:
    placement = place(asked, option, [OWN], 0, component=False)
    assert placement.isolation is isolation
    assert why in placement.why


def test_a_word_of_the_pod_for_one_container_goes_before_that_for_all() -> None:
    of_all = plan(of_pod="process")
    of_all.config.metadata.name = "app"
    of_all.pod.config.annotations[f"{KEY}.app"] = "in-process"
    of_all.pod.config.annotations[f"{KEY}.other"] = "process"
    placement = place(of_all, OUT, [OWN], 0, component=False)
    assert placement.isolation is IN
    assert placement.why == f"the pod's annotation {KEY}.app"


@pytest.mark.parametrize(
    ("asked", "preopen", "daemon_uid", "why"),
    [
        (plan(7), OWN, 0, ""),
        (plan(7), VOLUME, 0, "/data is a mount, and the module's user is user 7"),
        (plan(7), WRITABLE, 0, "/ is a writable root file system"),
        (plan(0), VOLUME, 0, ""),
        (plan(0, capabilities=DROPPED), VOLUME, 0, "root without DAC_OVERRIDE"),
        # The pod's word for the weaker side does not count then.
        (plan(7, of_pod="in-process"), VOLUME, 0, "user 7"),
        (plan(1000), VOLUME, 1000, ""),
    ],
)
def test_who_may_less_than_the_daemon_gets_a_worker(
    asked: ContainerPlan, preopen: Preopen, daemon_uid: int, why: str
) -> None:
    placement = place(asked, IN, [preopen], daemon_uid, component=False)
    assert placement.isolation is (OUT if why else IN)
    assert why in placement.why


def test_without_root_there_is_no_worker() -> None:
    with pytest.raises(FailedPrecondition, match=r"/data is a mount.*user 7; only a daemon with root"):
        place(plan(7), IN, [VOLUME], 1000, component=False)


def test_what_is_mounted_later_is_seen_by_a_worker() -> None:
    asked = plan()
    asked.config.mounts.add(propagation=pb.MountPropagation.PROPAGATION_HOST_TO_CONTAINER)
    placement = place(asked, IN, [VOLUME], 0, component=False)
    assert placement.isolation is OUT
    assert "later" in placement.why
    # A daemon without root opens a directory where it lies.
    assert place(asked, IN, [VOLUME], 1000, component=False).isolation is IN


def test_a_terminal_needs_a_worker() -> None:
    asked = plan(of_container="in-process")
    asked.config.tty = True
    placement = place(asked, IN, [OWN], 0, component=False)
    assert placement.isolation is OUT
    assert "terminal" in placement.why


def test_what_takes_memory_that_no_limit_counts_gets_a_worker() -> None:
    asked = plan(of_container="in-process")
    assert place(asked, IN, [OWN], 0, component=False, description=MOST_DESCRIPTION).isolation is IN
    placement = place(asked, IN, [OWN], 0, component=False, description=MOST_DESCRIPTION + 1)
    assert placement.isolation is OUT
    assert "types, imports and exports" in placement.why


def test_a_component_gets_a_worker_whatever_is_asked_for() -> None:
    placement = place(plan(of_container="in-process"), IN, [OWN], 0, component=True)
    assert placement.isolation is OUT
    assert "component" in placement.why
    with pytest.raises(FailedPrecondition, match="component"):
        place(plan(), IN, [OWN], 1000, component=True)


def test_more_readers_than_the_engine_has_threads_for_get_workers() -> None:
    asked = plan()
    asked.config.stdin = True
    assert place(asked, IN, [OWN], 0, component=False, readers=MOST_READERS - 1).isolation is IN
    placement = place(asked, IN, [OWN], 0, component=False, readers=MOST_READERS)
    assert (placement.isolation, placement.why) == (OUT, "256 modules in the daemon have standard input already")
    assert place(plan(), IN, [OWN], 0, component=False, readers=MOST_READERS).isolation is IN
