"""Very many modules at once in one daemon: all start, it serves meanwhile, and nothing is left of any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import scale
from tests.support import wasm as guests
from tests.support.cri import Pod, container_config
from tests.support.images import Registry

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

CROWD = scale.count(full=1000, quick=60)
PER_POD = 10
T = TypeVar("T")
R = TypeVar("R")


def test_a_crowd_runs_is_served_and_stops(lab: Lab, registry: Registry) -> None:
    reference = registry.push_wasm("crowd/sleep:1", guests.SLEEP)
    lab.cri.pull(reference)

    def begin(number: int) -> tuple[Pod, list[str]]:
        pod = lab.pod("wasm")
        names = (f"{number}-{each}" for each in range(PER_POD))
        return pod, [lab.cri.run(pod, container_config(reference, name=name)) for name in names]

    crowd = at_once(begin, range(CROWD // PER_POD))
    containers = [container for _, mine in crowd for container in mine]
    states = Counter(container.state for container in lab.cri.containers())
    assert states == {pb.CONTAINER_RUNNING: CROWD}
    for container in containers:
        lab.cri.wait_log(container, "going to sleep", 60)
    listed = lab.cri.runtime.ListContainerStats(pb.ListContainerStatsRequest()).stats
    assert {stats.attributes.id for stats in listed} == set(containers)
    assert all(stats.memory.usage_bytes.value > 0 for stats in listed)
    # One by one, by their pods, and by their removal: half, a quarter and a quarter.
    half, quarter = containers[: CROWD // 2], containers[CROWD // 2 : CROWD * 3 // 4]
    at_once(lambda container: lab.cri.stop(container, 10), half)
    assert {lab.cri.status(container).exit_code for container in half} == {143}
    at_once(lab.cri.remove, quarter)
    at_once(lab.cri.stop_pod, [pod for pod, _ in crowd])
    states = Counter(container.state for container in lab.cri.containers())
    assert states == {pb.CONTAINER_EXITED: CROWD - len(quarter)}
    at_once(lab.cri.remove_pod, [pod for pod, _ in crowd])
    assert not lab.cri.containers()
    assert not lab.cri.pods()


def at_once(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    with ThreadPoolExecutor(8) as clients:
        return list(clients.map(call, items))
