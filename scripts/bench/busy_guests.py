"""What a hundred busy Wasm containers in the daemon's process do to its answers: the latency of Version and of stats.

Three kinds: `spin` computes, `ask` polls for nothing as fast as it can, `flood` writes to its log. As root, inside
`scripts/private-ns` (`scripts/bench/busy-guests` does that). Each figure stands beside the one of the same daemon with
nothing to do, a moment before: on a busy machine only their ratio means something.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

from cri_shim.pb import api_pb2 as pb
from scripts.bench.bed import bed
from scripts.bench.report import percentile
from tests.support import wasm as guests
from tests.support.cri import Cri, container_config
from tests.support.daemon import Daemon

KINDS = {"spin": guests.SPIN, "ask": guests.ASKER, "flood": guests.floods(0)}
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
        for kind in options.kinds:
            image = ground.registry.push_wasm(f"bench/{kind}:1", KINDS[kind])
            rounds = [one_round(ground.daemon, image, options.guests, options.calls) for _ in range(options.rounds)]
            for name in rounds[0]:
                print(f"{kind:6}{name:32}{percentile([each[name] for each in rounds], 50):10.2f}", flush=True)
    return 0


def one_round(daemon: Daemon, image: str, number: int, calls: int) -> dict[str, float]:
    with daemon.client(timeout=WITHIN) as cri:
        cri.pull(image)
        pod = cri.run_pod(daemon.pod_config(network=pb.NODE), "wasm")
        idle = latencies(cri, calls)
        for index in range(number):
            cri.run(pod, container_config(image, name=f"busy-{index}"))
        time.sleep(1)
        busy = latencies(cri, calls)
        stats = timed(lambda: cri.runtime.ListContainerStats(pb.ListContainerStatsRequest()))
        stopped = timed(lambda: cri.stop_pod(pod))
        cri.remove_all_pods()
    return {
        "Version p50, idle": percentile(idle, 50),
        "Version p99, idle": percentile(idle, 99),
        "Version p50": percentile(busy, 50),
        "Version p99": percentile(busy, 99),
        "Version p99 / idle p99": percentile(busy, 99) / percentile(idle, 99),
        "ListContainerStats of all": stats,
        "StopPodSandbox with all": stopped,
    }


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
