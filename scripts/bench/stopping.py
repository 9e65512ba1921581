"""How long StopContainer takes with Wasm containers in both placements, whatever they do at that moment.

From the call to the time of exit that the record has, and to the answer. As root, inside `scripts/private-ns`
(`scripts/bench/stopping` does that).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence

from cri_shim.pb import api_pb2 as pb
from scripts.bench.bed import bed
from scripts.bench.report import percentile
from scripts.bench.wasm import HANDLERS, PLACEMENTS
from tests.support import wasm as guests
from tests.support.cri import Cri, container_config
from tests.support.daemon import Daemon

KINDS = {
    "sleep": guests.SLEEP,
    "poll": guests.ASKER,
    "read": guests.CAT,
    "accept": guests.GREETER,
    "compute": guests.SPIN,
    "flood": guests.floods(0),
}
PORT = 18080
GRACE = 30
SETTLED = 0.02
"""Seconds after its start in which a guest gets to what it does."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="stopping", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="the median of them is printed (%(default)s)")
    add("--iterations", type=int, default=40, help="stops per round (%(default)s)")
    add("kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)} (all)")
    options = parser.parse_args(argv)
    if unknown := set(options.kinds) - KINDS.keys():
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    with bed("stopping", handlers=HANDLERS) as ground:
        ground.daemon.start()
        made = {kind: ground.registry.push_wasm(f"bench/{kind}:1", KINDS[kind]) for kind in options.kinds}
        print(f"median of {options.rounds} rounds; milliseconds to the exit: p50, p95, most; to the answer: the same")
        for placement, handler in PLACEMENTS.items():
            for kind, image in made.items():
                load = os.getloadavg()[0]
                rounds = [stops(ground.daemon, handler, kind, image, options.iterations) for _ in range(options.rounds)]
                cells = (f"{_median(rounds, at, percent):8.2f}" for at in (0, 1) for percent in (50, 95, 100))
                print(f"{placement:12}{kind:8}{''.join(cells)}   load {load:.1f}", flush=True)
    return 0


def stops(daemon: Daemon, handler: str, kind: str, image: str, iterations: int) -> list[tuple[float, float]]:
    """For each stop milliseconds to the exit and to the answer."""
    with daemon.client() as cri:
        cri.pull(image)
        config = daemon.pod_config(network=pb.NODE)
        if kind == "accept":
            config.annotations["cri-shim.io/listen"] = str(PORT)
        pod = cri.run_pod(config, handler)
        try:
            found = []
            for number in range(iterations + 1):
                wanted = container_config(image, name=f"{kind}-{number}")
                wanted.stdin = kind == "read"
                found.append(_one(cri, cri.run(pod, wanted)))
            return found[1:]  # the first one loads what is loaded once
        finally:
            cri.stop_pod(pod)
            cri.remove_pod(pod)


def _one(cri: Cri, container: str) -> tuple[float, float]:
    time.sleep(SETTLED)
    began = time.time()
    cri.stop(container, GRACE)
    answered = time.time()
    status = cri.status(container)
    if status.exit_code != 128 + 15:
        msg = f"{status.metadata.name} has ended by itself: {status.exit_code} {status.message}"
        raise RuntimeError(msg)
    cri.remove(container)
    return (status.finished_at / 1e9 - began) * 1000, (answered - began) * 1000


def _median(rounds: Sequence[Sequence[tuple[float, float]]], at: int, percent: int) -> float:
    return statistics.median(percentile([each[at] for each in found], percent) for found in rounds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
