"""Pods whose network does not let go, for ever: stop and remove still come to their end, and say what they left."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import msgspec
import pytest

from cri_shim.flows.pod_detach import ATTEMPTS
from cri_shim.model.pod import PodRecord
from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.support import leftovers
from tests.support.cri import Cri, Pod, container_config
from tests.support.daemon import Daemon
from tests.support.expect import refused
from tests.support.programs import PLUGINS, Programs

pytestmark = pytest.mark.root

INTERNAL = grpc.StatusCode.INTERNAL


@dataclass(frozen=True, slots=True)
class Site:
    """A daemon whose CNI plugins fail on command."""

    daemon: Daemon
    cri: Cri
    programs: Programs
    image: str

    def run_pod(self) -> Pod:
        """With a container, an address and a host port."""
        config = self.daemon.pod_config()
        config.port_mappings.add(container_port=80, host_port=18085)
        pod = self.cri.run_pod(config, "crun")
        self.cri.run(pod, container_config(self.image, "sleep", "1000"))
        return pod

    def problem(self, pod: Pod) -> str:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
        return str(json.loads(self.cri.runtime.PodSandboxStatus(request).info["info"])["problem"])

    def errors(self) -> list[str]:
        """What the daemon has logged as errors of its own, and not as the failure of a call."""
        lines = [json.loads(line) for line in self.daemon.log.read_text().splitlines() if line.startswith("{")]
        return [line["problem"] for line in lines if line["level"] == "error" and "problem" in line]


@pytest.fixture
def site(make_daemon: MakeDaemon, busybox: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    programs = Programs(tmp_path_factory.mktemp("bin"))
    for name in ("bridge", "host-local", "portmap"):
        programs.install(name, PLUGINS / name)
    daemon = make_daemon({"network": {"bin_dirs": [str(programs.directory)]}})
    with daemon.client() as cri:
        cri.pull(busybox)
        yield Site(daemon, cri, programs, busybox)
        programs.heal()
        cri.runtime.Status(pb.StatusRequest())  # it waits for what the daemon asks its runtimes at each start
    assert "Traceback" not in daemon.log.read_text()


def reboot(daemon: Daemon) -> None:
    """As a reboot does: processes, mounts and `state` go, files stay, the boot has another id."""
    daemon.stop()
    leftovers.sweep(daemon.base, daemon.cgroup_parent)
    shutil.rmtree(daemon.state)
    with contextlib.closing(sqlite3.connect(daemon.root / "state.db")) as connection, connection:
        for key, body in connection.execute("SELECT key, body FROM pods").fetchall():
            pod = msgspec.structs.replace(msgspec.msgpack.decode(body, type=PodRecord), boot_id="another")
            connection.execute("UPDATE pods SET body = ? WHERE key = ?", (msgspec.msgpack.encode(pod), key))
    subprocess.run(["iptables", "-t", "nat", "-F"], check=True)
    daemon.start()


@pytest.mark.parametrize("verb", ["stop", "remove"])
def test_a_plugin_that_always_fails_is_given_up(site: Site, verb: str) -> None:
    pod = site.run_pod()
    call = site.cri.stop_pod if verb == "stop" else site.cri.remove_pod
    site.programs.plan("portmap", "DEL", "fail")
    words = f"CNI plugin portmap of network {site.daemon.network_name} failed on DEL: told to fail"
    for _ in range(ATTEMPTS - 1):
        with refused(INTERNAL, words):
            call(pod)
        assert site.cri.pod_status(pod).state == pb.SANDBOX_NOTREADY
        assert site.problem(pod) == ""
    assert not site.errors()
    address = site.cri.pod_status(pod).network.ip
    call(pod)
    (told,) = site.errors()
    assert told.startswith(f"its network was given up after {ATTEMPTS} attempts in ")
    for part in (words, f"may be left behind: the lease of {address}", f"container id {pod.id}"):
        assert part in told
    if verb == "stop":
        assert site.problem(pod) == told
        calls = len(site.programs.calls("portmap"))
        site.cri.stop_pod(pod)
        site.cri.remove_pod(pod)
        assert len(site.programs.calls("portmap")) == calls
    assert not site.cri.pods()
    # The other plugins have done their part, and the network takes the next pod.
    assert not (site.daemon.leases / address).exists()
    site.programs.heal()
    site.cri.remove_pod(site.run_pod())


def test_attempts_are_counted_over_restarts(site: Site) -> None:
    pod = site.run_pod()
    with site.programs.missing("bridge"):
        for attempt in range(ATTEMPTS - 1):
            if attempt == 2:
                site.daemon.kill()
                site.daemon.start()
            with refused(INTERNAL, "CNI plugin bridge is not in "):
                site.cri.stop_pod(pod)
        site.cri.stop_pod(pod)
        assert "CNI plugin bridge is not in " in site.problem(pod)
        site.cri.remove_pod(pod)
    # Only the bridge plugin could have given the address back: it is the one that was named.
    (lease,) = site.daemon.leases.glob("10.*")
    assert lease.name in site.errors()[0]
    lease.unlink()


def test_pods_of_an_earlier_boot(site: Site) -> None:
    pod = site.run_pod()
    reboot(site.daemon)
    (container,) = site.cri.containers()
    assert site.cri.pod_status(pod).state == pb.SANDBOX_NOTREADY
    assert site.problem(pod) == "the node was rebooted"
    assert site.cri.status(container.id).state == pb.CONTAINER_EXITED
    assert list(site.daemon.leases.glob("10.*"))
    (site.daemon.cni / "10-pods.conflist").unlink()
    site.cri.stop_pod(pod)
    assert not list(site.daemon.leases.glob("10.*"))
    site.cri.remove_pod(pod)
    assert not site.errors()


def test_pods_of_an_earlier_boot_whose_plugins_are_gone(site: Site) -> None:
    """All that can be missing is missing: namespace, configuration, plugins."""
    pod = site.run_pod()
    reboot(site.daemon)
    (site.daemon.cni / "10-pods.conflist").unlink()
    with contextlib.ExitStack() as missing:
        for name in ("bridge", "host-local", "portmap"):
            missing.enter_context(site.programs.missing(name))
        for _ in range(ATTEMPTS - 1):
            with refused(INTERNAL, "CNI plugin portmap is not in "):
                site.cri.stop_pod(pod)
        site.cri.stop_pod(pod)
        assert site.problem(pod).startswith("the node was rebooted; its network was given up after ")
        site.cri.remove_pod(pod)
    assert not site.cri.pods()
