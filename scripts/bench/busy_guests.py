"""What a hundred busy Wasm containers in the daemon's process do to its answers, and to the start and end of others.

Three kinds: `spin` computes, `ask` polls for nothing as fast as it can, `flood` writes to its log. The first line of
another container is seen in its log so long after the call that starts it. As root, inside
`scripts/private-ns` (`scripts/bench/busy-guests` does that). Each figure stands beside the one of the same daemon with
nothing to do, a moment before: on a busy machine only their ratio means something.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from cri_shim.pb import api_pb2 as pb
from scripts.bench.bed import bed
from scripts.bench.report import percentile
from tests.support import wasm as guests
from tests.support.cri import Cri, Pod, container_config
from tests.support.daemon import Daemon

KINDS = {"spin": guests.SPIN, "ask": guests.ASKER, "flood": guests.floods(0)}
STOPPED = 20
"""Of the guests, one after the other, before the pod is."""
WITHIN = 120.0
"""Seconds that one call may take: a daemon that hangs is a result, not an endless run."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="busy-guests", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--guests", type=int, default=100, metavar="N", help="(%(default)s)")
    add("--calls", type=int, default=1000, metavar="N", help="calls of Version that are measured (%(default)s)")
    add("--rounds", type=int, default=3, help="the median of them is printed (%(default)s)")
    add("kinds", nargs="*", default=["spin"], help=f"of {', '.join(KINDS)} (spin)")
    options = parser.parse_args(argv)
    if unknown := set(options.kinds) - KINDS.keys():
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    with bed("busy") as ground:
        ground.daemon.start()
        print(f"load average {os.getloadavg()[0]:.1f}; milliseconds, median of {options.rounds} rounds")
        quiet = ground.registry.push_wasm("bench/quiet:1", guests.SLEEP)
        for kind in options.kinds:
            image = ground.registry.push_wasm(f"bench/{kind}:1", KINDS[kind])
            measure = partial(one_round, ground.daemon, image, quiet, options.guests, options.calls)
            rounds = [measure() for _ in range(options.rounds)]
            for name in rounds[0]:
                print(f"{kind:6}{name:32}{percentile([each[name] for each in rounds], 50):10.2f}", flush=True)
    return 0


def one_round(daemon: Daemon, image: str, quiet: str, number: int, calls: int) -> dict[str, float]:
    with daemon.client(timeout=WITHIN) as cri:
        cri.pull(image)
        cri.pull(quiet)
        pod = cri.run_pod(daemon.pod_config(network=pb.NODE), "wasm")
        first_lines(cri, pod, quiet, 1)  # loads what is loaded once
        idle = latencies(cri, calls)
        created = [cri.create(pod, container_config(image, name=f"busy-{index}")) for index in range(number)]
        starts = [timed(partial(cri.start, container)) for container in created]
        time.sleep(1)
        busy = latencies(cri, calls)
        lists = [timed(lambda: cri.runtime.ListContainers(pb.ListContainersRequest())) for _ in range(calls // 10)]
        stats = timed(lambda: cri.runtime.ListContainerStats(pb.ListContainerStatsRequest()))
        lines = first_lines(cri, pod, quiet, STOPPED)
        stops = [timed(partial(cri.stop, container, 10)) for container in created[:STOPPED]]
        stopped = timed(lambda: cri.stop_pod(pod))
        cri.remove_all_pods()
    return {
        "Version p50, idle": percentile(idle, 50),
        "Version p99, idle": percentile(idle, 99),
        "Version p50": percentile(busy, 50),
        "Version p99": percentile(busy, 99),
        "Version p99 / idle p99": percentile(busy, 99) / percentile(idle, 99),
        "ListContainers p95": percentile(lists, 95),
        "ListContainerStats of all": stats,
        "StartContainer p50": percentile(starts, 50),
        "StartContainer p95": percentile(starts, 95),
        "first line of a quiet one p50": percentile(lines, 50),
        "first line of a quiet one p95": percentile(lines, 95),
        "StopContainer p50": percentile(stops, 50),
        "StopContainer p95": percentile(stops, 95),
        "StopPodSandbox with all": stopped,
    }


def first_lines(cri: Cri, pod: Pod, image: str, number: int) -> list[float]:
    """Of containers that print one line and sleep."""
    found = []
    for _ in range(number):
        container = cri.create(pod, container_config(image, name="quiet"))
        begin = time.perf_counter()
        cri.start(container)
        cri.wait_log(container, "", WITHIN)
        found.append((time.perf_counter() - begin) * 1000)
        cri.stop(container, 10)
        cri.remove(container)
    return found


def latencies(cri: Cri, calls: int) -> list[float]:
    for _ in range(calls // 10):
        cri.runtime.Version(pb.VersionRequest())
    return [timed(lambda: cri.runtime.Version(pb.VersionRequest())) for _ in range(calls)]


def timed(call: Callable[[], object]) -> float:
    """Milliseconds. The pause lets the guests go on, as the time between two calls of a kubelet does."""
    time.sleep(0.001)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
