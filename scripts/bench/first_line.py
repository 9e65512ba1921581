"""How long it takes from StartContainer to the first line of the container in its CRI log."""

from __future__ import annotations

import time

from scripts.bench.running import FIRST_LINE_SECONDS, Kind, remove
from tests.support.cri import Cri, Pod


def milliseconds(kind: Kind, iterations: int) -> list[float]:
    """One value per container, from the client's call to the time that the line bears."""
    with kind.client() as cri:
        kind.pull(cri)
        pod = kind.pod(cri)
        try:
            _one(kind, cri, pod, "first")  # loads what is loaded once
            return [_one(kind, cri, pod, f"main-{number}") for number in range(iterations)]
        finally:
            remove(cri, pod)


def _one(kind: Kind, cri: Cri, pod: Pod, name: str) -> float:
    container = cri.create(pod, kind.container(name))
    begin = time.time()
    cri.start(container)
    line = cri.wait_log(container, "", FIRST_LINE_SECONDS)[0]
    cri.stop(container)
    cri.remove(container)
    return (line.time.timestamp() - begin) * 1000
