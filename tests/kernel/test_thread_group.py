"""The cgroup for threads of the daemon, in the hierarchy of the machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cri_shim.adapters.cgroups import CgroupHost, Cgroups, Version
from cri_shim.adapters.thread_group import ThreadGroup

pytestmark = pytest.mark.root


@pytest.fixture
def group() -> Iterator[ThreadGroup]:
    made = ThreadGroup(Cgroups.detect())
    yield made
    made.close()


@pytest.fixture
def alone() -> Iterator[None]:
    """In a cgroup where no other daemon of the machine changes what is below. On v2 there can be no such place."""
    root = Cgroups.detect().controllers["cpu"]
    if Cgroups.detect().version is Version.V2:
        yield
        return
    before, place = root / cpu_cgroup().strip("/"), root / cpu_cgroup().strip("/") / f"cri-shim-test-{os.getpid()}"
    place.mkdir()
    (place / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (before / "cgroup.procs").write_text("0")
        place.rmdir()


def in_a_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def cpu_cgroup() -> str:
    """Of the calling thread."""
    lines = [line.split(":", 2) for line in Path("/proc/thread-self/cgroup").read_text().splitlines()]
    wanted = "" if Cgroups.detect().version is Version.V2 else "cpu"
    return next(path for _, names, path in lines if wanted in names.split(","))


def test_a_thread_is_below_the_process_and_alone_there(group: ThreadGroup) -> None:
    before = cpu_cgroup()
    seen: list[object] = []
    in_a_thread(lambda: seen.extend((group.enter(), cpu_cgroup())))
    assert seen == [True, f"{before.rstrip('/')}/cri-shim-threads"]
    assert cpu_cgroup() == before
    root = Cgroups.detect().controllers["cpu"]
    group.close()
    place = root / before.strip("/") / "cri-shim-threads"
    threads = "cgroup.threads" if Cgroups.detect().version is Version.V2 else "tasks"
    assert not place.exists() or (place / threads).read_text(), "stays only where another daemon has threads in it"


def test_two_daemons_share_it_and_none_takes_it_from_the_other(group: ThreadGroup) -> None:
    other = ThreadGroup(Cgroups.detect())
    seen: list[bool] = []
    in_a_thread(lambda: seen.append(group.enter()))
    in_a_thread(lambda: seen.append(other.enter()))
    other.close()  # nobody is in it: it goes
    in_a_thread(lambda: seen.append(group.enter()))
    assert seen == [True, True, True]


def test_who_is_hurried_takes_all_that_weigh_with_it_until_it_leaves(alone: None, group: ThreadGroup) -> None:
    def weight() -> int:
        root, version2 = Cgroups.detect().controllers["cpu"], Cgroups.detect().version is Version.V2
        place = root / cpu_cgroup().strip("/") / "cri-shim-threads"
        return int((place / ("cpu.weight" if version2 else "cpu.shares")).read_text())

    inside, end = threading.Event(), threading.Event()

    def run() -> None:
        group.enter()
        inside.set()
        end.wait()
        group.leave()

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait()
    before = weight()
    group.hurry(threading.get_native_id())  # is not in there
    assert (weight(), os.getpriority(os.PRIO_PROCESS, 0)) == (before, 0)
    assert thread.native_id is not None
    group.hurry(thread.native_id)
    assert weight() > 10 * before
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) < 0
    end.set()
    thread.join()
    assert weight() == before


def test_where_there_is_none_nothing_fails() -> None:
    group = ThreadGroup(CgroupHost(Version.V2, {}, (), None))
    assert not group.enter()
    group.close()
