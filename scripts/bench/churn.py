"""How many pods a second live their whole life: run, create, start, the container's end, stop, remove."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from cri_shim.pb import api_pb2 as pb
from scripts.bench.running import Kind, remove
from tests.support.cri import Cri

_FIRST_LOOK = 0.002
_LAST_LOOK = 0.02
"""Seconds between two looks at a container that is to end: they get longer."""


def rate(kind: Kind, clients: int, seconds: float) -> float:
    """Lifecycles a second, by so many clients on connections of their own."""
    with kind.client() as cri:
        kind.pull(cri)
        lifecycle(kind, cri)  # loads what is loaded once
    begin = time.monotonic()

    def live(_number: int) -> int:
        done = 0
        with kind.client() as cri:
            while time.monotonic() - begin < seconds:
                lifecycle(kind, cri)
                done += 1
        return done

    with ThreadPoolExecutor(clients) as threads:
        done = sum(threads.map(live, range(clients)))
    return done / (time.monotonic() - begin)


def lifecycle(kind: Kind, cri: Cri) -> None:
    """One pod with one container that ends by itself. SystemExit when it ends otherwise than well."""
    pod = kind.pod(cri)
    try:
        container = cri.run(pod, kind.container())
        pause = _FIRST_LOOK
        while (status := cri.status(container)).state != pb.CONTAINER_EXITED:
            time.sleep(pause)
            pause = min(pause * 2, _LAST_LOOK)
        if status.exit_code != 0:
            raise SystemExit(f"churn: {kind.title}: exit code {status.exit_code}: {status.message}")
    finally:
        remove(cri, pod)
