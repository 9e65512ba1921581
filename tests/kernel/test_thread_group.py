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


def weight() -> int:
    """Of all threads in the group, as CPU shares."""
    root, is_v2 = Cgroups.detect().controllers["cpu"], Cgroups.detect().version is Version.V2
    place = root / cpu_cgroup().strip("/") / "cri-shim-threads"
    found = int((place / ("cpu.weight" if is_v2 else "cpu.shares")).read_text())
    return found * 1024 // 100 if is_v2 else found


class Member:
    """A thread that is in the group until it is told to leave."""

    def __init__(self, group: ThreadGroup, shares: int) -> None:
        self._group, self._shares = group, shares
        self._inside, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)  # a test that fails leaves it
        self._thread.start()
        self._inside.wait()
        self.id = self._thread.native_id or 0

    def _run(self) -> None:
        self._group.weigh(threading.get_native_id(), self._shares)
        self._group.enter()
        self._inside.set()
        self._end.wait()
        self._group.leave()

    def leave(self) -> None:
        self._end.set()
        self._thread.join()


def test_it_weighs_what_its_threads_ask_for_within_bounds(alone: None, group: ThreadGroup) -> None:
    little, much = Member(group, 2), Member(group, 300)
    assert 290 <= weight() <= 302
    other = Member(group, 100)
    assert 390 <= weight() <= 402
    group.weigh(other.id, 200)
    assert 490 <= weight() <= 502
    group.weigh(other.id, 1 << 18)  # more than the daemon can do without
    assert 500 <= weight() < (1 << 18)
    for member in (much, other):
        member.leave()
    assert 250 <= weight() <= 256
    group.weigh(other.id, 1024)  # has left
    assert 250 <= weight() <= 256
    little.leave()
    unsaid = Member(group, 0)
    assert weight() >= 500
    unsaid.leave()


def test_who_is_hurried_takes_all_that_weigh_with_it_until_it_leaves(alone: None, group: ThreadGroup) -> None:
    member, other = Member(group, 300), Member(group, 2)
    before, mine = weight(), os.getpriority(os.PRIO_PROCESS, 0)
    group.hurry(threading.get_native_id())  # is not in there
    assert (weight(), os.getpriority(os.PRIO_PROCESS, 0)) == (before, mine)
    group.hurry(member.id)
    assert weight() > 10 * before
    assert os.getpriority(os.PRIO_PROCESS, member.id) < 0
    member.leave()
    assert 250 <= weight() < before
    other.leave()


def test_where_there_is_none_nothing_fails() -> None:
    group = ThreadGroup(CgroupHost(Version.V2, {}, (), None))
    assert not group.enter()
    group.close()
