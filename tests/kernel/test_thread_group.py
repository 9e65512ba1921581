"""The cgroup for threads of the daemon, in the hierarchy of the machine."""

from __future__ import annotations

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


def test_where_there_is_none_nothing_fails() -> None:
    group = ThreadGroup(CgroupHost(Version.V2, {}, (), None))
    assert not group.enter()
    group.close()
