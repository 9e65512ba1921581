"""Programs that fail at every step of a pod's life: the error is named, the world is as before, a retry succeeds.

The programs are the real ones behind `tests/fakes/faulty.sh`, which fails where a test says. Two things must always
come true: a call that failed can be repeated once the cause is gone, and stop and remove end with nothing left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.bad_requests import TAKEN, UNMET, cases
from tests.support import images, scale
from tests.support.cri import Cri, Pod, container_config
from tests.support.daemon import Daemon
from tests.support.expect import eventually, refused
from tests.support.programs import ALWAYS, PLUGINS, RUNTIMES, Programs
from tests.support.world import unchanged

pytestmark = pytest.mark.root

INTERNAL = grpc.StatusCode.INTERNAL
FULL_ONLY = pytest.mark.skipif(scale.FULL not in os.environ, reason="waits for minutes: scripts/test --full")


@dataclass(frozen=True, slots=True)
class Site:
    """A daemon whose programs fail on command."""

    daemon: Daemon
    cri: Cri
    programs: Programs
    image: str

    def pod_config(self) -> pb.PodSandboxConfig:
        """With every step that there is: a network of two plugins, and an infra container."""
        config = self.daemon.pod_config(pid=pb.POD)
        config.port_mappings.add(container_port=80, host_port=18080)
        return config

    def bare_pod(self, handler: str = "crun") -> Pod:
        """A pod without network and infra container."""
        return self.cri.run_pod(self.daemon.pod_config(network=pb.NODE), handler)

    def config(self, name: str = "main") -> pb.ContainerConfig:
        return container_config(self.image, "sleep", "1000", name=name)


@pytest.fixture(scope="module")
def standing(make_shared_daemon: MakeDaemon, busybox: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """No failure of this file may cost a stack trace, not even in the log."""
    programs = Programs(tmp_path_factory.mktemp("bin"))
    for name in ("bridge", "host-local", "portmap"):
        programs.install(name, PLUGINS / name)
    found = {name: programs.install(name, Path(shutil.which(name) or name)) for name in ("conmon", *RUNTIMES)}
    infra = shutil.copy(shutil.which("catatonit") or "catatonit", programs.directory)
    daemon = make_shared_daemon(
        {
            "handlers": {name: {"kind": "oci", "path": str(found[name])} for name in RUNTIMES},
            "default_handler": "crun",
            "monitor": {"conmon": str(found["conmon"]), "infra": infra},
            "network": {"bin_dirs": [str(programs.directory)]},
        }
    )
    with daemon.client() as cri:
        cri.pull(busybox)
        site = Site(daemon, cri, programs, busybox)
        for handler in RUNTIMES:  # and what is made by the first pod, and kept
            cri.run(cri.run_pod(site.pod_config(), handler), site.config())
            cri.remove_all_pods()
        eventually(lambda: not any("probe" in line for line in daemon.traces().processes))
        yield site
    assert "Traceback" not in daemon.log.read_text()


@pytest.fixture
def site(standing: Site) -> Iterator[Site]:
    """Whatever a test did: when the programs work again, everything can be removed."""
    with unchanged(standing.daemon):
        yield standing
        standing.programs.heal()
        standing.cri.remove_all_pods()


CREATE_STEPS = [
    ("conmon fails", "conmon", "run", "fail", "conmon ended before it had created the container: told to fail"),
    ("conmon is killed", "conmon", "run", "kill", "conmon ended before it had created the container"),
    ("create fails", "runtime", "create", "fail", "cannot create the container: told to fail"),
    ("create fails late", "runtime", "create", "fail-after", "cannot create the container: told to fail"),
    ("create is killed", "runtime", "create", "kill", "conmon ended before it had created the container"),
]
START_STEPS = [
    ("start fails", "runtime", "start", "fail", "cannot start the container: told to fail"),
    ("start fails late", "runtime", "start", "fail-after", "cannot start the container: told to fail"),
    ("start is killed", "runtime", "start", "kill", "cannot start the container"),
]
NETWORK_STEPS = [
    (f"{action} of {plugin}", plugin, "ADD", action, f"CNI plugin {plugin} of network")
    for plugin in ("bridge", "portmap")
    for action in ("fail", "fail-after", "kill")
]
ADDRESS_STEP = ("no address", "host-local", "ADD", "fail", "CNI plugin bridge of network")
GARBAGE = [
    (f"garbage of {plugin}", plugin, "ADD", "garbage", f"result of CNI plugin {plugin} is not JSON")
    for plugin in ("bridge", "portmap")
]


@cases("program, verb, action, words", [*NETWORK_STEPS, ADDRESS_STEP, *GARBAGE, *CREATE_STEPS, *START_STEPS])
def test_run_pod(site: Site, program: str, verb: str, action: str, words: str) -> None:
    """The last steps are those of the infra container."""
    config = site.pod_config()
    site.programs.plan(program, verb, action)
    with unchanged(site.daemon), refused(INTERNAL, words):
        site.cri.run_pod(config)
    assert not site.cri.pods()
    site.programs.heal()
    site.cri.run(site.cri.run_pod(config), site.config())


@pytest.mark.parametrize("plugin", ["bridge", "portmap"])
def test_run_pod_that_cannot_be_undone(site: Site, plugin: str) -> None:
    """The pod stays, not ready, for the kubelet to find: until its network can be detached."""
    config = site.pod_config()
    site.programs.plan("crun", "create", "fail")
    site.programs.plan(plugin, "DEL", "fail")
    with refused(INTERNAL, "cannot create the container: told to fail"):
        site.cri.run_pod(config)
    (pod,) = site.cri.pods()
    assert pod.state == pb.SANDBOX_NOTREADY
    for call in (site.cri.stop_pod, site.cri.remove_pod):
        with refused(
            INTERNAL, f"CNI plugin {plugin} of network {site.daemon.network_name} failed on DEL: told to fail"
        ):
            call(pod.id)
    with refused(TAKEN, "state notready"):
        site.cri.run_pod(config)
    site.programs.heal()
    site.cri.stop_pod(pod.id)
    site.cri.remove_pod(pod.id)
    site.cri.run_pod(config)


@pytest.mark.parametrize("handler", RUNTIMES)
@cases("program, verb, action, words", CREATE_STEPS)
def test_create_container(site: Site, program: str, verb: str, action: str, words: str, handler: str) -> None:
    pod = site.bare_pod(handler)
    site.programs.plan(program, verb, action)
    with unchanged(site.daemon), refused(INTERNAL, words):
        site.cri.create(pod, site.config())
    assert not site.cri.containers()
    site.programs.heal()
    site.cri.run(pod, site.config())


def test_create_container_that_cannot_be_undone(site: Site) -> None:
    """What is left of it goes with the next attempt, or with the pod."""
    pod = site.bare_pod()
    site.programs.plan("crun", "create", "fail-after")
    site.programs.plan("crun", "delete", "fail")
    for name in ("one", "two"):
        with refused(INTERNAL, "cannot create the container: told to fail"):
            site.cri.create(pod, site.config(name))
    assert not site.cri.containers()
    with refused(INTERNAL, "cannot delete the container: told to fail"):
        site.cri.create(pod, site.config("one"))
    site.programs.heal()
    site.cri.run(pod, site.config("one"))


@pytest.mark.parametrize("handler", RUNTIMES)
@cases("program, verb, action, words", START_STEPS)
def test_start_container(site: Site, program: str, verb: str, action: str, words: str, handler: str) -> None:
    pod = site.bare_pod(handler)
    container = site.cri.create(pod, site.config())
    site.programs.plan(program, verb, action)
    with refused(INTERNAL, words):
        site.cri.start(container)
    status = site.cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    assert words in status.message
    with refused(UNMET, "exited"):
        site.cri.start(container)
    site.cri.remove(container)
    site.programs.heal()
    site.cri.run(pod, site.config())


@pytest.mark.parametrize("handler", RUNTIMES)
def test_start_container_without_its_monitor(site: Site, handler: str) -> None:
    pod = site.bare_pod(handler)
    container = site.cri.create(pod, site.config())
    monitor = next(line for line in site.daemon.traces().processes if f"-c {container}" in line)
    os.kill(int(monitor.split()[0]), signal.SIGKILL)
    eventually(lambda: monitor not in site.daemon.traces().processes)
    with refused(INTERNAL, "cannot start the container"):
        site.cri.start(container)
    status = site.cri.status(container)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 128, "StartError")
    site.cri.remove(container)


@pytest.mark.parametrize("handler", RUNTIMES)
@pytest.mark.parametrize("action", ["fail", "fail-after", "kill"])
def test_exec(site: Site, action: str, handler: str) -> None:
    container = site.cri.run(site.bare_pod(handler), site.config())
    assert site.cri.exec(container, ["true"]).exit_code == 0
    site.programs.plan(handler, "exec", action)
    with unchanged(site.daemon), refused(INTERNAL, "cannot exec in the container"):
        site.cri.exec(container, ["sleep", "777"])
    site.programs.heal()
    assert site.cri.exec(container, ["true"]).exit_code == 0


@pytest.mark.parametrize(
    ("action", "times"), [("fail", 1), ("fail", 2), ("fail", ALWAYS), ("fail-after", 1), ("kill", 1)]
)
@pytest.mark.parametrize("plugin", ["bridge", "portmap"])
def test_stop_pod_when_the_network_does_not_let_go(site: Site, plugin: str, action: str, times: int) -> None:
    pod = site.cri.run_pod(site.pod_config())
    site.cri.run(pod, site.config())
    site.programs.plan(plugin, "DEL", action, times)
    for _ in range(min(times, 3)):
        with refused(INTERNAL, f"CNI plugin {plugin} of network {site.daemon.network_name} failed on DEL"):
            site.cri.stop_pod(pod)
        assert site.cri.pod_status(pod).state == pb.SANDBOX_NOTREADY
    if times == ALWAYS:
        site.programs.heal()
    site.cri.stop_pod(pod)
    assert not list(site.daemon.leases.glob("10.*"))
    calls = len(site.programs.calls(plugin))
    site.cri.stop_pod(pod)
    site.cri.remove_pod(pod)
    assert len(site.programs.calls(plugin)) == calls  # what is detached is not detached again


@pytest.mark.parametrize("action", ["fail", "fail-after", "kill"])
def test_stop_and_remove_when_the_runtime_does_not_delete(site: Site, action: str) -> None:
    """First that of the infra container, then that of the pod's container."""
    pod = site.cri.run_pod(site.pod_config())
    container = site.cri.run(pod, site.config())
    site.programs.plan("crun", "delete", action)
    if action == "fail-after":  # the container is gone, whatever the runtime says
        site.cri.remove(container)
    else:
        with refused(INTERNAL, "cannot delete the container"):
            site.cri.stop_pod(pod)
        with refused(INTERNAL, "cannot delete the container"):
            site.cri.remove(container)
        with refused(INTERNAL, "cannot delete the container"):
            site.cri.remove_pod(pod)
        assert [listed.id for listed in site.cri.pods()] == [pod.id]
        assert site.cri.status(container).state == pb.CONTAINER_EXITED
        site.programs.heal()
    site.cri.remove_pod(pod)
    assert not site.cri.containers()


@pytest.mark.parametrize("program", ["bridge", "portmap", "conmon", "crun", "catatonit"])
def test_a_program_that_is_missing(site: Site, program: str) -> None:
    """As after an upgrade that has gone wrong: nothing is lost, and all goes on with the program back."""
    config = site.pod_config()
    with unchanged(site.daemon), site.programs.missing(program), refused(UNMET, program):
        site.cri.run_pod(config)
    pod = site.cri.run_pod(config)
    site.cri.run(pod, site.config())
    with site.programs.missing(program):
        if program in {"conmon", "catatonit"}:
            site.cri.stop_pod(pod)
        else:
            with refused(UNMET if program == "crun" else INTERNAL, program):
                site.cri.stop_pod(pod)
    site.cri.stop_pod(pod)
    site.cri.remove_pod(pod)


HANGING = [("bridge", "ADD"), ("portmap", "ADD"), ("conmon", "run"), ("crun", "create")]


@pytest.mark.parametrize(("program", "verb"), [*HANGING, ("crun", "start")])
def test_a_client_that_does_not_wait(site: Site, program: str, verb: str) -> None:
    """The request goes on without it, and a retry gets the pod that it makes."""
    config = site.pod_config()
    site.programs.plan(program, verb, "hang")
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
        site.cri.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=config), timeout=0.5)
    assert not site.cri.pods()
    site.programs.heal()
    pod = site.cri.run_pod(config)
    assert [listed.id for listed in site.cri.pods()] == [pod.id]


@pytest.mark.parametrize(("program", "verb"), HANGING)
def test_a_failure_that_no_client_sees(site: Site, program: str, verb: str) -> None:
    config = site.pod_config()
    with unchanged(site.daemon):
        site.programs.plan(program, verb, "hang")
        site.programs.plan("crun", "start", "fail")
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
            site.cri.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=config), timeout=0.5)
        site.programs.release(program, verb)
    site.programs.heal()
    site.cri.run_pod(config)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """As when a file system has found an error in itself; what is open for writing stays so."""
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def test_a_root_that_became_read_only(site: Site) -> None:
    refusal = f"Read-only file system: {site.daemon.root}/containers/"
    pod = site.cri.run_pod(site.pod_config())
    container = site.cri.run(pod, site.config())
    with unchanged(site.daemon), read_only(site.daemon.root), refused(INTERNAL, refusal):
        site.cri.create(pod, site.config("other"))
    with read_only(site.daemon.root):
        site.cri.stop_pod(pod)
        with refused(INTERNAL, refusal):
            site.cri.remove(container)
        with refused(INTERNAL, refusal):
            site.cri.remove_pod(pod)
    site.cri.remove_pod(pod)


def test_a_network_whose_configuration_goes(site: Site) -> None:
    """What was attached by it is detached all the same, by what the daemon remembers."""
    config, file = site.pod_config(), site.daemon.cni / "10-pods.conflist"
    pod, content = site.cri.run_pod(site.pod_config()), file.read_bytes()
    with unchanged(site.daemon):
        for broken in (b"", b"{", b"[]", b'{"cniVersion": "9.9.9", "name": "x", "plugins": [{"type": "bridge"}]}'):
            file.write_bytes(broken)
            with refused(UNMET, f"CNI configuration {file}"):
                site.cri.run_pod(config)
        file.unlink()
        with refused(UNMET, "no readable CNI configuration"):
            site.cri.run_pod(config)
    site.cri.stop_pod(pod)
    assert not list(site.daemon.leases.glob("10.*"))
    file.write_bytes(content)
    site.cri.run_pod(config)


def test_an_unpacker_that_is_gone(site: Site, registry: images.Registry) -> None:
    layer = images.layer([images.file("f", b"x")])
    name = registry.push("test/small:1", images.image([layer]))
    zygote = next(line for line in site.daemon.traces().processes if "cri_shim/zygote" in line)
    os.kill(int(zygote.split()[0]), signal.SIGKILL)
    site.cri.pull(name)
    site.cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=name)))


@FULL_ONLY
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("program", "verb"), [*HANGING, ("crun", "start")])
def test_a_program_that_never_ends(site: Site, program: str, verb: str) -> None:
    site.programs.plan(program, verb, "hang")
    with unchanged(site.daemon), refused(grpc.StatusCode.DEADLINE_EXCEEDED, "did not"):
        site.cri.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=site.pod_config()), timeout=200)


@FULL_ONLY
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("program", "verb"), [("bridge", "DEL"), ("crun", "delete")])
def test_an_end_that_never_ends(site: Site, program: str, verb: str) -> None:
    pod = site.cri.run_pod(site.pod_config())
    site.programs.plan(program, verb, "hang")
    with refused(INTERNAL if program == "bridge" else grpc.StatusCode.DEADLINE_EXCEEDED, "did not finish within 60 s"):
        site.cri.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=200)
    site.programs.heal()
    site.cri.remove_pod(pod)
