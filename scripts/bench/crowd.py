"""Very many containers of one kind at once in one daemon: start them, look how it answers, end them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from cri_shim.pb import api_pb2 as pb
from scripts.bench import memory
from scripts.bench.report import percentile
from scripts.bench.running import Kind, running
from tests.support.cri import Cri

_CALLS = 100
_PAUSE = 0.1
"""Seconds between two looks while something else goes on."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Milliseconds of each call."""

    version: list[float] = field(default_factory=list)
    listing: list[float] = field(default_factory=list)

    def add(self, cri: Cri) -> None:
        """Ask once more."""
        begin = time.perf_counter()
        cri.runtime.Version(pb.VersionRequest(), timeout=60)
        middle = time.perf_counter()
        cri.runtime.ListContainers(pb.ListContainersRequest(), timeout=60)
        self.version.append((middle - begin) * 1000)
        self.listing.append((time.perf_counter() - middle) * 1000)

    def in_words(self) -> str:
        """Medians, and 99th percentiles."""
        parts = {"Version": self.version, "ListContainers": self.listing}
        return ", ".join(f"{name} {percentile(v, 50):.2f}, {percentile(v, 99):.2f}" for name, v in parts.items() if v)


def measure(kind: Kind, number: int) -> list[str]:
    """Lines that say all that was seen."""
    with kind.client() as cri, kind.client() as other, ExitStack() as crowd:
        kind.pull(cri)
        with running(kind, cri, 1):
            pass  # loads what is loaded once
        idle = Answers()
        for _ in range(_CALLS):
            idle.add(other)
        before, begin = memory.pss([kind.pid]), time.monotonic()
        with _asked(other) as starting:
            pods = crowd.enter_context(running(kind, cri, number))
        started = time.monotonic() - begin
        alive = sum(container.state == pb.CONTAINER_RUNNING for container in cri.containers())
        if alive != len(pods):
            raise SystemExit(f"crowd: {alive} of {len(pods)} containers run")
        grown, there = memory.pss([kind.pid]) - before, Answers()
        for _ in range(_CALLS):
            there.add(other)
        begin = time.monotonic()
        with _asked(other) as ending:
            crowd.close()
        ended = time.monotonic() - begin
        if cri.containers() or cri.pods():
            raise SystemExit("crowd: not all are gone")
    asked = {"idle": idle, "while they start": starting, "with all of them": there, "while they end": ending}
    return [
        f"started in {started:.1f} s, gone in {ended:.1f} s, {grown:.1f} MiB (PSS) more; ms (p50 and p99):",
        *(f"  {title}: {answers.in_words()}" for title, answers in asked.items()),
    ]


@contextmanager
def _asked(cri: Cri) -> Iterator[Answers]:
    """Ask again and again, all the while."""
    found, done = Answers(), threading.Event()

    def ask() -> None:
        while not done.wait(_PAUSE):
            found.add(cri)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
