"""Names of cgroups for both drivers, and what a mount table says about a host; none of it needs root."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_shim.adapters.cgroups import CgroupHost, Cgroups, Version, host_from_mounts
from cri_shim.kernel.mounts import parse_mountinfo
from cri_shim.model.errors import InvalidArgument
from cri_shim.spec.cgroup_plan import (
    Driver,
    cgroup_dir,
    cgroups_path_for_spec,
    monitor_dir,
    parent_of,
    pod_dir,
    resolve_driver,
)

ID = "c0ffee"


@pytest.mark.parametrize(
    ("parent", "in_spec", "directory", "monitor"),
    [
        ("", "/c0ffee", "c0ffee", "cri-shim-conmon-c0ffee"),
        ("/", "/c0ffee", "c0ffee", "cri-shim-conmon-c0ffee"),
        ("/kubepods/pod1", "/kubepods/pod1/c0ffee", "kubepods/pod1/c0ffee", "kubepods/pod1/cri-shim-conmon-c0ffee"),
        ("kubepods//./pod1/", "/kubepods/pod1/c0ffee", "kubepods/pod1/c0ffee", "kubepods/pod1/cri-shim-conmon-c0ffee"),
    ],
)
def test_cgroupfs(parent: str, in_spec: str, directory: str, monitor: str) -> None:
    assert cgroups_path_for_spec(parent, ID, Driver.CGROUPFS) == in_spec
    assert cgroup_dir(parent, ID, Driver.CGROUPFS) == directory
    assert cgroup_dir(parent_of(in_spec), ID, Driver.CGROUPFS) == directory
    assert monitor_dir(parent, ID, Driver.CGROUPFS) == monitor


@pytest.mark.parametrize(
    ("parent", "in_spec", "directory"),
    [
        ("", "system.slice:cri-shim:c0ffee", "system.slice/cri-shim-c0ffee.scope"),
        ("-.slice", "-.slice:cri-shim:c0ffee", "cri-shim-c0ffee.scope"),
        ("a-b-c.slice", "a-b-c.slice:cri-shim:c0ffee", "a.slice/a-b.slice/a-b-c.slice/cri-shim-c0ffee.scope"),
        ("/a.slice/a-b.slice", "a-b.slice:cri-shim:c0ffee", "a.slice/a-b.slice/cri-shim-c0ffee.scope"),
    ],
)
def test_systemd(parent: str, in_spec: str, directory: str) -> None:
    assert cgroups_path_for_spec(parent, ID, Driver.SYSTEMD) == in_spec
    assert cgroup_dir(parent, ID, Driver.SYSTEMD) == directory
    assert cgroup_dir(parent_of(in_spec), ID, Driver.SYSTEMD) == directory


@pytest.mark.parametrize(
    ("parent", "driver", "directory"),
    [
        ("", Driver.CGROUPFS, ""),
        ("/", Driver.CGROUPFS, ""),
        ("/kubepods/pod1/", Driver.CGROUPFS, "kubepods/pod1"),
        ("", Driver.SYSTEMD, ""),  # containers go to system.slice then, which is not the pod's
        ("-.slice", Driver.SYSTEMD, ""),
        ("a-b.slice", Driver.SYSTEMD, "a.slice/a-b.slice"),
    ],
)
def test_the_pods_own(parent: str, driver: Driver, directory: str) -> None:
    assert pod_dir(parent, driver) == directory


@pytest.mark.parametrize(
    ("parent", "driver", "form"),
    [("a.slice", Driver.CGROUPFS, "a systemd slice"), ("/a", Driver.SYSTEMD, "a cgroupfs path")],
)
def test_mismatch_names_the_field_and_both_drivers(parent: str, driver: Driver, form: str) -> None:
    expected = f"linux.cgroup_parent '{parent}' is {form}, but the cgroup driver is {driver.value}; set the same"
    for function in (cgroups_path_for_spec, cgroup_dir, monitor_dir):
        with pytest.raises(InvalidArgument) as caught:
            function(parent, ID, driver)
        assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("parent", ["/a/../../b", "..", "a\0b", "a\nb", "-a.slice", "a--b.slice", "a-.slice", ".slice"])
def test_hostile_parents_are_refused(parent: str) -> None:
    driver = Driver.SYSTEMD if parent.endswith(".slice") else Driver.CGROUPFS
    with pytest.raises(InvalidArgument, match=r"^linux\.cgroup_parent "):
        cgroup_dir(parent, ID, driver)


@given(st.text(max_size=30))
def test_any_parent_is_refused_or_stays_below_the_root(parent: str) -> None:
    try:
        directory = cgroup_dir(parent, ID, Driver.CGROUPFS)
    except InvalidArgument:
        return
    parts = directory.split("/")
    assert parts[-1] == ID
    assert not {"", ".", ".."} & set(parts)
    assert cgroups_path_for_spec(parent, ID, Driver.CGROUPFS) == f"/{directory}"


def test_driver_auto_follows_the_service_manager() -> None:
    assert resolve_driver("auto", systemd_runs=True) is Driver.SYSTEMD
    assert resolve_driver("auto", systemd_runs=False) is Driver.CGROUPFS
    assert resolve_driver("cgroupfs", systemd_runs=True) is Driver.CGROUPFS


TMPFS = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
V1 = TMPFS + (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd,release_agent=/x\n"
)
V2 = "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


def host(table: str) -> CgroupHost:
    return host_from_mounts(Path("/sys/fs/cgroup"), parse_mountinfo(table.encode()))


def test_legacy_host() -> None:
    seen = host(V1)
    at = Path("/sys/fs/cgroup")
    assert (seen.version, seen.unified) == (Version.V1, None)
    assert seen.controllers == {"cpu": at / "cpu,cpuacct", "cpuacct": at / "cpu,cpuacct", "memory": at / "memory"}
    assert seen.hierarchies == (at / "cpu,cpuacct", at / "memory", at / "systemd")


def test_hybrid_host_uses_the_legacy_controllers() -> None:
    seen = host(HYBRID)
    assert (seen.version, seen.unified) == (Version.HYBRID, Path("/sys/fs/cgroup/unified"))
    assert seen.controllers == host(V1).controllers
    assert seen.hierarchies[-1] == Path("/sys/fs/cgroup/unified")


def test_unified_host_and_bare_host() -> None:
    assert host(V2) == CgroupHost(Version.V2, {}, (Path("/sys/fs/cgroup"),), Path("/sys/fs/cgroup"))
    assert host(TMPFS) == CgroupHost(Version.V2, {}, (), None)


@pytest.mark.parametrize(
    ("version", "files", "limit", "kills"),
    [
        (Version.V1, {"memory.limit_in_bytes": "9223372036854771712\n"}, None, 0),
        (Version.V1, {"memory.limit_in_bytes": "4096\n", "memory.oom_control": "under_oom 0\noom_kill 3\n"}, 4096, 3),
        (Version.V2, {"memory.max": "max\n", "memory.events": "oom 9\noom_kill 0\n"}, None, 0),
        (
            Version.V2,
            {"memory.max": "4096\n", "memory.events": "low 0\noom 9\noom_kill 2\n"},
            4096,
            2,
        ),
        (Version.V2, {}, None, 0),
    ],
)
def test_memory_files(tmp_path: Path, version: Version, files: dict[str, str], limit: int | None, kills: int) -> None:
    directory = tmp_path / "pod" / ID
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    cgroups = Cgroups(CgroupHost(version, {"memory": tmp_path}, (tmp_path,), None), Driver.CGROUPFS)
    assert cgroups.memory_limit("/pod", ID) == limit
    assert cgroups.oom_kills("/pod", ID) == kills


def test_a_kill_whose_cgroup_is_gone_counts_for_one_end(tmp_path: Path) -> None:
    def kills(number: int, *place: str) -> None:
        directory = tmp_path.joinpath(*place)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.events").write_text(f"oom 9\noom_kill {number}\n")

    cgroups = Cgroups(CgroupHost(Version.V2, {"memory": tmp_path}, (tmp_path,), None), Driver.CGROUPFS)
    kills(1, "pod")
    kills(0, "pod", "sibling")
    before = cgroups.unclaimed_oom_kills("/pod", ID)
    assert before == 1
    # In a sibling that is there: not ours.
    kills(3, "pod")
    kills(2, "pod", "sibling")
    assert not cgroups.oom_killed_since("/pod", ID, before)
    # In one that is gone: of the container that ends first.
    kills(4, "pod")
    assert cgroups.oom_killed_since("/pod", ID, before)
    assert not cgroups.oom_killed_since("/pod", "another", before)
    # In one that is still there when its end is told, and then goes.
    kills(5, "pod")
    kills(1, "pod", ID)
    assert cgroups.oom_killed_since("/pod", ID, before)
    assert not cgroups.oom_killed_since("/pod", "another", before)
    (tmp_path / "pod" / ID / "memory.events").unlink()
    assert not cgroups.oom_killed_since("/pod", "another", before)
    v1 = Cgroups(CgroupHost(Version.V1, {"memory": tmp_path}, (tmp_path,), None), Driver.CGROUPFS)
    assert v1.unclaimed_oom_kills("/pod", ID) == 0
    assert not v1.oom_killed_since("/pod", ID, 0)
    (tmp_path / "pod" / ID / "memory.oom_control").write_text("under_oom 0\noom_kill 1\n")
    assert v1.oom_killed_since("/pod", ID, 0)
