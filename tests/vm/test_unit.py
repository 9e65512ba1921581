"""deploy/cri-shim.service under a real systemd: its start, its ends, and what they mean for containers."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.cgroup_plan import Driver, cgroup_dir, monitor_dir
from tests.e2e.conftest import Lab, lab_on
from tests.support import images, leftovers
from tests.support.daemon import Daemon
from tests.support.expect import eventually

pytestmark = [pytest.mark.root, pytest.mark.vm]

UNIT = "cri-shim.service"
CONFIG = Path("/etc/cri-shim/config.yaml")
DROP_IN = Path(f"/run/systemd/system/{UNIT}.d/test.conf")
SLICE = "cri_shim_unit.slice"
SECONDS = 60


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def shown(what: str) -> str:
    return systemctl("show", "--value", "--property", what, UNIT)


def main_pid() -> int:
    return int(shown("MainPID"))


def journal(since: str) -> str:
    subprocess.run(["journalctl", "--sync"], check=True)
    command = ["journalctl", "--quiet", "--unit", UNIT, "--output", "cat", "--after-cursor", since]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cursor() -> str:
    said = subprocess.run(["journalctl", "--lines", "0", "--show-cursor"], check=True, capture_output=True, text=True)
    return said.stdout.splitlines()[-1].removeprefix("-- cursor: ")


@pytest.fixture(scope="module")
def service(short_directory: Path) -> Iterator[Daemon]:
    """The service as a node has it, with the networks and the registries of a test daemon that never runs."""
    paper = Daemon(short_directory / "unit", settings={"log": {"format": "auto"}}, number=90)
    paper.cgroup_parent = SLICE
    settings = yaml.safe_load(paper.config.read_text())
    CONFIG.parent.mkdir(exist_ok=True)
    # listen, root and state stay as they are by default.
    CONFIG.write_text(yaml.safe_dump({key: settings[key] for key in ("log", "network", "images")}))
    paper.socket = Path("/run/cri-shim/cri-shim.sock")
    systemctl("start", UNIT)
    yield paper
    systemctl("start", UNIT)
    with paper.client() as cri:
        cri.remove_all_pods()
    systemctl("stop", UNIT)
    CONFIG.unlink()


@pytest.fixture
def lab(service: Daemon, busybox: str, registry: images.Registry) -> Iterator[Lab]:
    systemctl("start", UNIT)
    with service.client() as cri:
        yield lab_on(service, cri, busybox, registry)
        cri.remove_all_pods()


@pytest.fixture
def pid(lab: Lab) -> Iterator[Callable[[], int]]:
    """A container that runs during the test: its first process, which has to be the same at the end."""
    container = lab.cri.run(lab.pod("runc"), lab.shell("echo ready; exec sleep 1000"))
    (first,) = processes(container)

    def now() -> int:
        (found,) = processes(container)
        return found

    yield now
    assert now() == first
    with lab.daemon.client() as cri:
        status = cri.status(container)
        assert (status.state, status.reason) == (pb.CONTAINER_RUNNING, "")
        assert cri.exec(container, ["true"], within=30).exit_code == 0


def processes(container: str) -> list[int]:
    place = Path("/sys/fs/cgroup", cgroup_dir(SLICE, container, Driver.SYSTEMD))
    return [int(word) for word in (place / "cgroup.procs").read_text().split()]


def serves(daemon: Daemon) -> bool:
    with daemon.client(timeout=30) as cri:
        return cri.runtime.Version(pb.VersionRequest()).version == "0.1.0"


def restarted(before: int) -> Callable[[], bool]:
    """Whether systemd has started the service anew, and it is ready."""
    return lambda: shown("ActiveState") == "active" and main_pid() not in {0, before}


def test_it_is_ready_when_systemd_says_so(service: Daemon) -> None:
    systemctl("restart", UNIT)
    assert serves(service)
    assert (shown("Type"), shown("ActiveState"), shown("NRestarts")) == ("notify", "active", "0")
    environment = Path(f"/proc/{main_pid()}/environ").read_bytes()
    assert b"NOTIFY_SOCKET=" in environment


def test_the_service_has_the_nodes_mounts_and_containers_have_none_of_its_rights(lab: Lab) -> None:
    daemon = main_pid()
    assert os.readlink(f"/proc/{daemon}/ns/mnt") == os.readlink("/proc/1/ns/mnt")
    assert Path(f"/proc/{daemon}/oom_score_adj").read_text().strip() == "-999"
    container = lab.cri.run(lab.pod("runc"), lab.shell("cat /proc/self/oom_score_adj; env; exec sleep 1000"))
    lines = [line.text for line in lab.cri.wait_log(container, "PATH=", within=30)]
    assert lines[0] == "0"
    assert not [line for line in lines if line.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_", "INVOCATION_"))]
    # Nothing but the daemon and its zygote is left in the service's cgroup for systemd to look after.
    monitor = Path("/sys/fs/cgroup", monitor_dir(SLICE, container, Driver.SYSTEMD), "cgroup.procs")
    assert len(monitor.read_text().split()) == 1


def test_containers_outlive_a_restart(pid: Callable[[], int], service: Daemon) -> None:
    before = main_pid()
    systemctl("restart", UNIT)
    assert main_pid() != before
    assert serves(service)
    assert pid()


def test_containers_outlive_a_stop(pid: Callable[[], int], service: Daemon) -> None:
    began = time.monotonic()
    systemctl("stop", UNIT)
    assert time.monotonic() - began < SECONDS
    assert shown("Result") == "success"
    assert pid()
    systemctl("start", UNIT)
    assert serves(service)


def test_a_crash_starts_it_anew(pid: Callable[[], int], service: Daemon) -> None:
    before = main_pid()
    systemctl("kill", "--kill-whom=main", "--signal=KILL", UNIT)
    eventually(restarted(before), within=SECONDS)
    assert serves(service)
    assert pid()


def test_a_daemon_that_hangs_is_replaced(pid: Callable[[], int], service: Daemon) -> None:
    DROP_IN.parent.mkdir(exist_ok=True)
    DROP_IN.write_text("[Service]\nWatchdogSec=8\n")
    systemctl("daemon-reload")
    try:
        systemctl("restart", UNIT)
        before = main_pid()
        # Longer than the watchdog allows: it tells that it lives.
        time.sleep(12)
        assert main_pid() == before
        since = cursor()
        systemctl("kill", "--kill-whom=main", "--signal=STOP", UNIT)
        eventually(lambda: "Watchdog timeout" in journal(since), within=SECONDS)
        # What hangs in user space gets systemd's SIGABRT at once, what is stopped has to go on for it.
        systemctl("kill", "--kill-whom=main", "--signal=CONT", UNIT)
        eventually(restarted(before), within=SECONDS)
    finally:
        DROP_IN.unlink()
        systemctl("daemon-reload")
        systemctl("restart", UNIT)
    assert serves(service)
    assert pid()


def test_reload_takes_over_the_log_level(lab: Lab) -> None:
    def is_quiet() -> bool:
        since = cursor()
        assert serves(lab.daemon)
        return journal(since) == ""

    before, written = main_pid(), CONFIG.read_text()
    assert not is_quiet()
    try:
        CONFIG.write_text(written.replace("level: debug", "level: error"))
        systemctl("reload", UNIT)
        eventually(is_quiet, within=SECONDS)
    finally:
        CONFIG.write_text(written)
        since = cursor()
        systemctl("reload", UNIT)
    eventually(lambda: "configuration reloaded" in journal(since), within=SECONDS)
    assert main_pid() == before


def test_pods_live_in_the_slice_that_the_kubelet_names(lab: Lab) -> None:
    assert lab.cri.runtime.RuntimeConfig(pb.RuntimeConfigRequest()).linux.cgroup_driver == pb.SYSTEMD
    container = lab.cri.run(lab.pod("crun"), lab.shell("exec sleep 1000"))
    scope = f"cri-shim-{container}.scope"
    assert systemctl("show", "--value", "--property", "Slice", scope) == SLICE
    lab.cri.stop(container)
    lab.cri.remove(container)
    eventually(lambda: not leftovers.traces_of(Path("/nowhere"), f"/{SLICE}").cgroups, within=SECONDS)
    for unit in (scope, f"cri-shim-conmon-{container}.scope"):
        assert systemctl("show", "--value", "--property", "LoadState", unit) == "not-found"
