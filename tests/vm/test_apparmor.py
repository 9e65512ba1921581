"""AppArmor for real: our default profile in the kernel, what it takes away, and what it leaves."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cri_shim.kernel import apparmor
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.apparmor import DEFAULT_PROFILE
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.support.cri import container_config
from tests.support.expect import refused

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.parametrize("handler", ["runc", "crun"])]

MINE = "cri-shim-test-mine"
SLEEP = "exec sleep 1000"
LABEL = "cat /proc/1/attr/current"
RuntimeDefault, Unconfined = pb.SecurityProfile.RuntimeDefault, pb.SecurityProfile.Unconfined
Localhost = pb.SecurityProfile.Localhost
# A process with all capabilities, so that nothing but the profile is in its way.
SCRIPT = """
    exec 2>/dev/null
    mkdir /m && mount -t tmpfs none /m && echo mounted
    cat /proc/sys/vm/swappiness >/tmp/s && cat /tmp/s >/proc/sys/vm/swappiness && echo changed a sysctl of the node
    (: >/proc/sysrq-trigger) && echo opened sysrq
    (: </proc/kcore) && echo opened kcore
    (: >/proc/irq/default_smp_affinity) && echo opened irq
    cat /proc/sys/kernel/shmmni >/tmp/s && cat /tmp/s >/proc/sys/kernel/shmmni && echo changed a sysctl of the pod
    sleep 1000 & readlink /proc/$!/exe >/tmp/s && echo looked; kill $!; wait $!; echo signal $?
    echo 0 >/proc/self/oom_score_adj && echo scored
    umount /dev/mqueue && echo unmounted
    true"""
ALLOWED = ["changed a sysctl of the pod", "looked", "signal 143", "scored", "unmounted"]
DENIED = ["mounted", "changed a sysctl of the node", "opened sysrq", "opened kcore", "opened irq"]


@pytest.fixture(scope="module")
def confined_lab(make_shared_daemon: MakeDaemon, busybox: str) -> Iterator[Lab]:
    daemon = make_shared_daemon()
    with daemon.client() as cri:
        cri.pull(busybox)
        yield Lab(daemon, cri, busybox, "")


@pytest.fixture
def lab(confined_lab: Lab) -> Iterator[Lab]:
    yield confined_lab
    confined_lab.cri.remove_all_pods()


@pytest.fixture(scope="module")
def mine() -> Iterator[str]:
    """A loaded profile that lets nothing be written."""
    text = f"profile {MINE} flags=(attach_disconnected) {{ file, signal, capability, deny /tmp/** w, }}\n"
    subprocess.run(["apparmor_parser", "--replace", "--skip-cache"], input=text.encode(), check=True)
    yield MINE
    subprocess.run(["apparmor_parser", "--remove"], input=text.encode(), check=True)


def powerful(config: pb.ContainerConfig) -> None:
    config.linux.security_context.capabilities.add_capabilities.append("ALL")


def profiled(
    kind: pb.SecurityProfile.ProfileType.ValueType, name: str = "", *also: Callable[[pb.ContainerConfig], None]
) -> Callable[[pb.ContainerConfig], None]:
    def ask(config: pb.ContainerConfig) -> None:
        profile = pb.SecurityProfile(profile_type=kind, localhost_ref=name)
        config.linux.security_context.apparmor.CopyFrom(profile)
        for adjust in also:
            adjust(config)

    return ask


def test_the_default_takes_the_node_away_and_leaves_the_pod(lab: Lab, handler: str) -> None:
    pod = lab.pod(handler)
    assert lab.say(pod, SCRIPT, powerful) == ALLOWED
    # The same without it: what was missing is missing because of the profile.
    unconfined = lab.say(pod, SCRIPT, profiled(Unconfined, "", powerful), name="unconfined")
    assert sorted(unconfined) == sorted([*DENIED, *ALLOWED])

    def without_privileges(config: pb.ContainerConfig) -> None:
        powerful(config)
        config.linux.security_context.no_new_privs = True

    # crun stacks the profile on its own one then.
    assert lab.say(pod, SCRIPT, without_privileges, name="stacked") == ALLOWED


def test_which_profile(lab: Lab, handler: str, mine: str) -> None:
    default, own = f"{DEFAULT_PROFILE} (enforce)", f"{mine} (enforce)"
    sandbox = lab.pod_config()
    sandbox.linux.security_context.privileged = True
    pod = lab.pod(handler, config=sandbox)

    def old(text: str) -> Callable[[pb.ContainerConfig], None]:
        return lambda config: setattr(config.linux.security_context, "apparmor_profile", text)

    def privileged(config: pb.ContainerConfig) -> None:
        config.linux.security_context.privileged = True

    expected: list[tuple[Callable[[pb.ContainerConfig], None], str]] = [
        (lambda config: None, default),
        (profiled(RuntimeDefault), default),
        (profiled(Unconfined), "unconfined"),
        (profiled(Localhost, mine), own),
        (old("runtime/default"), default),
        (old(f"localhost/{mine}"), own),
        (old("unconfined"), "unconfined"),
        (privileged, "unconfined"),
        (profiled(RuntimeDefault, "", privileged), "unconfined"),
    ]
    for number, (ask, label) in enumerate(expected):
        (seen,) = lab.say(pod, LABEL, ask, name=f"c{number}")
        # Debian's runtimes have profiles of their own, which are unconfined and stay with their children.
        assert seen in {label, f"{handler} (unconfined)" if label == "unconfined" else label}
    writing = lab.shell("touch /tmp/x", name="writing")
    profiled(Localhost, mine)(writing)
    assert lab.output(pod, writing)[0] != 0


def test_a_profile_that_is_not_loaded(lab: Lab, handler: str) -> None:
    config = lab.shell("true")
    profiled(Localhost, "not-there")(config)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "no profile 'not-there' is loaded on this node"):
        lab.cri.create(lab.pod(handler), config)


def test_further_processes_stops_and_the_infra_container(lab: Lab, handler: str) -> None:
    sandbox = lab.pod_config(pid=pb.POD)
    pod = lab.pod(handler, config=sandbox)
    container = lab.cri.run(pod, container_config(lab.busybox, "sh", "-c", f"echo up; {SLEEP}", pid=pb.POD))
    lab.cri.wait_log(container, "up")
    # The first process of the pod is that of the infra container.
    answer = lab.cri.exec(container, ["sh", "-c", f"{LABEL} /proc/self/attr/current"], within=30)
    first, further = answer.stdout.decode().splitlines()
    assert first in {f"{DEFAULT_PROFILE} (enforce)", f"{DEFAULT_PROFILE}//&crun (mixed)"}
    assert further == f"{DEFAULT_PROFILE} (enforce)"
    lab.cri.runtime.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0))
    assert lab.cri.wait_exit(container).exit_code == 137


def test_a_default_that_was_taken_away_comes_back(lab: Lab, handler: str) -> None:
    Path("/sys/kernel/security/apparmor/.remove").write_text(DEFAULT_PROFILE)
    assert DEFAULT_PROFILE not in apparmor.profiles()
    assert lab.say(lab.pod(handler), LABEL) == [f"{DEFAULT_PROFILE} (enforce)"]
