"""The cgroup adapter on the hierarchies that this machine has."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.adapters import cgroups as module
from cri_shim.adapters.cgroups import Cgroups, Version
from cri_shim.kernel import process, systemd
from cri_shim.spec.cgroup_plan import Driver
from tests.support.leftovers import CGROUP_PREFIX, remove_cgroup

pytestmark = pytest.mark.root

ID = "c0ffee" * 10
ROOTS = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]


@pytest.fixture(params=[root for root in ROOTS if root.exists()], ids=str)
def cgroups(request: pytest.FixtureRequest) -> Cgroups:
    """The host as it is, and its unified hierarchy alone: that is a v2 host without controllers."""
    root: Path = request.param
    return Cgroups(Cgroups.detect(root), Driver.CGROUPFS)


@pytest.fixture
def parent(run_name: str) -> Iterator[str]:
    name = f"/{CGROUP_PREFIX}{run_name}-cgroups"
    yield name
    cgroups = Cgroups(Cgroups.detect(), Driver.CGROUPFS)
    cgroups.kill_all(name, ID)
    remove_cgroup(name)
    left = [root for root in cgroups.host.hierarchies if (root / name.strip("/")).exists()]
    assert left == []


def place(cgroups: Cgroups, parent: str, child: process.Child, below: str = "") -> None:
    for root in cgroups.host.hierarchies:
        directory = root / parent.strip("/") / ID / below
        directory.mkdir(parents=True, exist_ok=True)
        if "cpuset" not in root.name:
            (directory / "cgroup.procs").write_text(str(child.pid))


def test_detects_this_machine() -> None:
    host = Cgroups.detect()
    assert host.hierarchies
    if host.version is Version.V2:
        assert set(host.controllers.values()) <= {host.unified}
    else:
        assert host.controllers["memory"] / "cgroup.procs" in (host.controllers["memory"]).iterdir()


async def test_kill_reaches_sub_cgroups_and_remove_takes_all(cgroups: Cgroups, parent: str) -> None:
    children = [process.spawn(["sleep", "60"]) for _ in range(3)]
    for child, below in zip(children, ("", "inner", "inner/most"), strict=True):
        place(cgroups, parent, child, below)
    assert cgroups.processes(parent, ID) == sorted(child.pid for child in children)
    # In the test's own loop: the children are reaped only afterwards, a zombie has left its cgroup.
    assert cgroups.kill_all(parent, ID)
    assert {await child.wait() for child in children} == {-9}
    cgroups.remove(parent, ID)
    cgroups.remove(parent, ID)
    assert cgroups.processes(parent, ID) == []
    assert cgroups.kill_all(parent, ID)


async def test_frozen_container_can_be_killed(cgroups: Cgroups, parent: str) -> None:
    child = process.spawn(["sleep", "60"])
    place(cgroups, parent, child)
    frozen = cgroups.host.controllers.get("freezer")
    if frozen is not None:
        (frozen / parent.strip("/") / ID / "freezer.state").write_text("FROZEN")
    elif cgroups.host.unified is not None:
        (cgroups.host.unified / parent.strip("/") / ID / "cgroup.freeze").write_text("1")
    assert cgroups.kill_all(parent, ID)
    assert await child.wait() == -9


async def test_busy_cgroup_is_not_removed(cgroups: Cgroups, parent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUSY_SECONDS", 0.1)
    child = process.spawn(["sleep", "60"])
    place(cgroups, parent, child)
    with pytest.raises(OSError, match="cgroup still has processes") as caught:
        cgroups.remove(parent, ID)
    assert caught.value.errno == errno.EBUSY
    assert process.process_start_time(child.pid) is not None
    child.kill()
    await child.wait()
    cgroups.remove(parent, ID)


async def test_monitor_goes_beside_the_container_and_is_removed_with_it(cgroups: Cgroups, parent: str) -> None:
    child = process.spawn(["sleep", "60"])
    where = cgroups.place_monitor(child.pid, parent, ID)
    assert where == f"{parent.strip('/')}/cri-shim-conmon-{ID}"
    of_child = Path(f"/proc/{child.pid}/cgroup").read_text()
    of_us = Path("/proc/self/cgroup").read_text()
    assert f":/{where}\n" in of_child
    if cgroups.host.version is not Version.V2:
        assert [line for line in of_child.splitlines() if ":cpuset:" in line] == [
            line for line in of_us.splitlines() if ":cpuset:" in line
        ]
    child.kill()
    await child.wait()
    cgroups.remove(parent, ID)


@pytest.mark.parametrize("reason", ["driver", "parent"])
async def test_monitor_falls_back_below_the_daemons_own_cgroup(
    cgroups: Cgroups, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = functools.partial(systemd.start_scope, manager=tmp_path / "nobody")
    monkeypatch.setattr(systemd, "start_scope", nobody)
    child = process.spawn(["sleep", "60"])
    fallback = Cgroups(cgroups.host, Driver.SYSTEMD) if reason == "driver" else cgroups
    where = fallback.place_monitor(child.pid, "/a.slice" if reason == "driver" else "/cgroup.procs", ID)
    assert where.endswith("monitors")
    assert f"{where}\n" in Path(f"/proc/{child.pid}/cgroup").read_text()
    child.kill()
    await child.wait()
    for root, path in cgroups._own_paths().items():
        if (root / path / "monitors").exists():
            (root / path / "monitors").rmdir()


def test_placing_a_process_that_is_gone_never_fails(cgroups: Cgroups, parent: str) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert isinstance(cgroups.place_monitor(gone.pid, parent, ID), str)
    cgroups.remove(parent, ID)
    for root, path in cgroups._own_paths().items():
        if (root / path / "monitors").exists():
            (root / path / "monitors").rmdir()


@pytest.mark.skipif(Cgroups.detect().version is Version.V2, reason="cgroup.kill is the kernel's: it spares nobody")
def test_the_daemon_never_kills_itself(parent: str) -> None:
    cgroups = Cgroups(Cgroups.detect(), Driver.CGROUPFS)
    root = cgroups.host.controllers["pids"]
    before = root / cgroups._own_paths()[root]
    directory = root / parent.strip("/") / ID
    directory.mkdir(parents=True)
    (directory / "cgroup.procs").write_text(str(os.getpid()))
    try:
        assert cgroups.kill_all(parent, ID)
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
    cgroups.remove(parent, ID)
