"""What plugins are asked beside ADD and DEL: STATUS and GC by a fake of CNI 1.1, CHECK by real plugins too.

Debian's plugins know CNI 1.0, which has neither STATUS nor GC.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cri_shim.flows.network_watch import INTERVAL
from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.support.cri import Cri
from tests.support.daemon import Daemon
from tests.support.expect import eventually
from tests.support.programs import PLUGINS, Programs

pytestmark = pytest.mark.root

FAKE = Path(__file__).parent.parent / "fakes" / "plugin.sh"
SOON = INTERVAL + 55


@dataclass(frozen=True, slots=True)
class Site:
    """A daemon on a network of two plugins that attach nothing."""

    daemon: Daemon
    cri: Cri
    plugins: Path

    def configure(self, version: str = "1.1.0", **more: object) -> None:
        network = {"cniVersion": version, "name": "paper", "plugins": [{"type": "first"}, {"type": "second"}], **more}
        (self.daemon.cni / "10-pods.conflist").write_text(json.dumps(network))

    def calls(self, verb: str, plugin: str = "first") -> list[Mapping[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.plugins / f"{plugin}.calls").read_text().splitlines()
            return [call for call in map(json.loads, lines) if call["verb"] == verb]
        return []

    def condition(self) -> tuple[bool, str]:
        conditions = self.cri.runtime.Status(pb.StatusRequest(), timeout=60).status.conditions
        (found,) = [condition for condition in conditions if condition.type == "NetworkReady"]
        assert found.reason == ("" if found.status else "NetworkPluginNotReady")
        return found.status, found.message

    def warnings(self, event: str) -> list[Mapping[str, Any]]:
        lines = [json.loads(line) for line in self.daemon.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["level"] == "warning" and line["event"] == event]


@pytest.fixture
def site(make_daemon: MakeDaemon, tmp_path: Path) -> Iterator[Site]:
    with _site(make_daemon, tmp_path, check=True) as made:
        yield made


@contextlib.contextmanager
def _site(make_daemon: MakeDaemon, tmp_path: Path, *, check: bool) -> Iterator[Site]:
    for name in ("first", "second"):
        (tmp_path / name).symlink_to(FAKE)
    daemon = make_daemon({"network": {"bin_dirs": [str(tmp_path)], "check": check}})
    with daemon.client() as cri:
        made = Site(daemon, cri, tmp_path)
        made.configure()
        yield made
        made.condition()  # Status waits for what the daemon asks its runtimes at each start


def test_the_network_is_ready_when_its_plugins_say_so(site: Site) -> None:
    eventually(lambda: site.condition() == (True, ""), SOON)
    assert "prevResult" not in site.calls("STATUS")[0]["stdin"]
    assert site.calls("STATUS")[0]["stdin"]["cniVersion"] == "1.1.0"
    fails = site.plugins / "second.STATUS.fails"
    fails.write_text("no route to the others")
    eventually(lambda: not site.condition()[0], SOON)
    assert site.condition()[1] == (
        "CNI plugin second of network paper failed on STATUS: no route to the others (code 50)"
    )
    fails.unlink()
    eventually(lambda: site.condition() == (True, ""), SOON)
    # Asked at the start of the daemon, it is known to its first client.
    before = len(site.calls("STATUS"))
    site.daemon.restart()
    assert site.condition() == (True, "")
    assert len(site.calls("STATUS")) == before + 1


def test_plugins_are_not_asked_for_each_call(site: Site) -> None:
    eventually(lambda: site.condition()[0], SOON)
    before = len(site.calls("STATUS"))
    begin = time.monotonic()
    while time.monotonic() - begin < INTERVAL / 2:
        site.condition()
    assert len(site.calls("STATUS")) - before <= 1 + (time.monotonic() - begin) / INTERVAL


def test_a_plugin_that_does_not_answer_holds_up_nobody(site: Site) -> None:
    hangs = site.plugins / "first.STATUS.hangs"
    hangs.touch()
    for _ in range(2):
        begin = time.monotonic()
        ready, message = site.condition()
        assert time.monotonic() - begin < 30
        assert (ready, message) == (False, "the CNI plugins have not yet said whether they are ready")
    eventually(lambda: len(site.calls("STATUS")) == 1)
    hangs.unlink()
    eventually(lambda: site.condition()[0], SOON)


def test_garbage_is_what_belongs_to_no_pod(site: Site) -> None:
    pods = [site.cri.run_pod(site.daemon.pod_config()) for _ in range(3)]
    site.cri.run_pod(site.daemon.pod_config(network=pb.NODE))
    site.cri.stop_pod(pods[0])
    (site.plugins / "first.DEL.fails").write_text("not now")
    with contextlib.suppress(Exception):
        site.cri.stop_pod(pods[1])
    assert not site.calls("GC")
    site.daemon.restart()
    for plugin in ("first", "second"):
        (call,) = site.calls("GC", plugin)
        assert (call["id"], call["netns"]) == ("", "")
        attachments = call["stdin"]["cni.dev/valid-attachments"]
        # The one that could not be detached is still to be.
        assert sorted(attachments, key=str) == sorted(
            ({"containerID": pod.id, "ifname": "eth0"} for pod in pods[1:]), key=str
        )
    (site.plugins / "first.DEL.fails").unlink()
    # A failure is told, all plugins are asked, and the daemon serves.
    (site.plugins / "first.GC.fails").write_text("no")
    site.daemon.restart()
    assert len(site.calls("GC", "second")) == 2
    (told,) = site.warnings("the network's garbage is not collected")
    assert told["error"] == "CNI plugin first of network paper failed on GC: no (code 50)"
    for off in ({"disableGC": True}, {"version": "1.0.0"}):
        site.configure(**off)
        site.daemon.restart()
    assert len(site.calls("GC")) == 2


def test_what_is_attached_is_checked(site: Site) -> None:
    pod = site.cri.run_pod(site.daemon.pod_config())
    site.cri.stop_pod(site.cri.run_pod(site.daemon.pod_config()))
    (site.plugins / "second.CHECK.fails").write_text("no address")
    site.daemon.restart()
    eventually(lambda: bool(site.calls("CHECK", "second")))
    (call,) = site.calls("CHECK")
    assert call["id"] == pod.id
    assert call["stdin"]["prevResult"]["ips"] == [{"address": "192.0.2.9/24", "interface": 0}]
    eventually(lambda: bool(site.warnings("the pod's network is not as it was made")))
    (told,) = site.warnings("the pod's network is not as it was made")
    assert pod.id.startswith(told["pod"])
    assert told["error"] == "CNI plugin second of network paper failed on CHECK: no address (code 50)"
    assert site.cri.pod_status(pod).state == pb.SANDBOX_READY
    # By the configuration that it was attached with.
    site.configure(disableCheck=True)
    site.daemon.restart()
    eventually(lambda: len(site.calls("CHECK")) == 2)
    other = site.cri.run_pod(site.daemon.pod_config())
    site.daemon.restart()
    eventually(lambda: len(site.calls("CHECK")) == 3)
    assert other.id not in {call["id"] for call in site.calls("CHECK")}


def test_real_plugins_check(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    programs = Programs(tmp_path)
    for name in ("bridge", "host-local", "portmap"):
        programs.install(name, PLUGINS / name)
    daemon = make_daemon({"network": {"bin_dirs": [str(tmp_path)], "check": True}})
    with daemon.client() as cri:
        site = Site(daemon, cri, tmp_path)
        # Without a host port: portmap 1.1 looks for the rules of an IPv4 address in the tables of IPv6 too.
        pod = cri.run_pod(daemon.pod_config())
        daemon.restart()
        eventually(lambda: "CHECK" in programs.calls("portmap"))
        namespace = daemon.state / "pods" / pod.id / "ns" / "net"
        subprocess.run(
            ["nsenter", f"--net={namespace}", "ip", "address", "flush", "dev", "eth0"], check=True, timeout=10
        )
        assert not site.warnings("the pod's network is not as it was made")
        daemon.restart()
        eventually(lambda: bool(site.warnings("the pod's network is not as it was made")))
        (told,) = site.warnings("the pod's network is not as it was made")
        assert "CNI plugin bridge" in told["error"]
        assert site.condition() == (True, "")
    # A network of 1.0 is asked nothing that it does not know.
    assert set(programs.calls("bridge")) == {"ADD", "CHECK"}


def test_nothing_is_checked_unless_the_node_wants_it(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with _site(make_daemon, tmp_path, check=False) as site:
        pod = site.cri.run_pod(site.daemon.pod_config())
        site.daemon.restart()
        site.cri.stop_pod(pod)
        assert len(site.calls("GC")) == 1
        assert not site.calls("CHECK")
