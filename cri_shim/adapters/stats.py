"""What containers and pods use right now: their cgroups' files and the counters of their network namespaces.

Not the arithmetic (`cri_shim.spec.cgroup_stats`) and not writable layers (`cri_shim.adapters.layer_usage`). Everything
blocks and belongs into a thread, one hop for all that a call wants. Invariant: what is gone reads as None; nothing that
one container does can fail the reading of another.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cri_shim.adapters.cgroups import CgroupHost, Version
from cri_shim.kernel import namespaces
from cri_shim.spec.cgroup_stats import (
    NOTHING,
    V1_FILES,
    V2_FILES,
    Reading,
    Usage,
    combined,
    parse_v1,
    parse_v2,
)
from cri_shim.spec.net_dev import Interface, parse_net_dev
from cri_shim.spec.stats_messages import PodReading

_FILE_BYTES: Final = 1 << 16
_RATE_NS: Final = 1_000_000_000
"""Two samples of a rate are at least this far apart: the kernel accounts CPU time in ticks of up to 10 ms."""
_PROC_NET_DEV: Final = Path("/proc/thread-self/net/dev")


@dataclass(frozen=True, slots=True)
class ContainerTarget:
    """A container to be read. `guest`: what its handler says itself; else its cgroup tells.

    `cgroup` is relative to the hierarchies' roots, and empty where there is nothing to read.
    """

    id: str
    cgroup: str
    guest: Callable[[], Usage] | None = None


@dataclass(frozen=True, slots=True)
class PodTarget:
    """A pod to be read. `containers` are all of it, also those that no client sees."""

    id: str
    cgroup: str
    """Empty where the pod has none of its own; it uses what its containers use then."""
    netns: Path | None
    containers: tuple[ContainerTarget, ...]


class CpuRates:
    """CPU use at present, from the last two samples of each container and pod. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: dict[str, tuple[int, int, int | None]] = {}

    def rate(self, key: str, at: int, usage_ns: int) -> int | None:
        """CPU ns per second; None at the first sample. A sample that comes too soon gives the rate from before."""
        with self._lock:
            before_at, before, known = self._samples.get(key, (at, usage_ns, None))
            elapsed = at - before_at
            if 0 < elapsed < _RATE_NS:
                return known
            rate = max(0, usage_ns - before) * 1_000_000_000 // elapsed if elapsed > 0 else known
            self._samples[key] = (at, usage_ns, rate)
            return rate

    def keep(self, keys: Collection[str]) -> None:
        """Forget all others."""
        with self._lock:
            self._samples = {key: sample for key, sample in self._samples.items() if key in keys}


class StatsReader:
    """Reads the hierarchies of one host."""

    def __init__(self, host: CgroupHost) -> None:
        self._host = host
        self._rates = CpuRates()

    def keep(self, containers: Iterable[str], pods: Iterable[str]) -> None:
        """Forget the rates of all others."""
        self._rates.keep({*containers, *map(_pod_key, pods)})

    def containers(self, targets: Sequence[ContainerTarget]) -> list[Reading | None]:
        """In the order of `targets`; None for one whose cgroup is gone."""
        return [self._container(target) for target in targets]

    def pods(self, targets: Sequence[PodTarget]) -> list[tuple[PodReading, list[Reading | None]]]:
        """Each pod with the readings of its containers, in the order of `targets`."""
        netns = [target.netns for target in targets if target.netns is not None]
        networks = dict(zip(netns, namespaces.visit_netns(netns, _interfaces), strict=True))
        return [self._pod(target, networks.get(target.netns) if target.netns else None) for target in targets]

    def _container(self, target: ContainerTarget) -> Reading | None:
        usage = target.guest() if target.guest is not None else self._read(target.cgroup)
        return None if usage is None else self._reading(target.id, usage)

    def _pod(self, target: PodTarget, network: Sequence[Interface] | None) -> tuple[PodReading, list[Reading | None]]:
        readings = self.containers(target.containers)
        # A guest in the daemon's own process is in no cgroup of the pod's.
        apart = [
            reading.usage
            for container, reading in zip(target.containers, readings, strict=True)
            if reading is not None and (container.guest is not None or not target.cgroup)
        ]
        total = self._reading(_pod_key(target.id), combined(self._read(target.cgroup) or NOTHING, apart))
        processes = sum(self._processes(container.cgroup) for container in target.containers)
        return PodReading(total, processes, network), readings

    def _reading(self, key: str, usage: Usage) -> Reading:
        at = time.time_ns()
        rate = None if usage.cpu is None else self._rates.rate(key, at, usage.cpu.usage_ns)
        return Reading(at, usage, rate)

    def _read(self, cgroup: str) -> Usage | None:
        if not cgroup:
            return None
        if self._host.version is Version.V2:
            files = dict(_texts(self._host.unified, cgroup, V2_FILES))
            return parse_v2(files) if files else None
        files = {
            name: text
            for controller, names in V1_FILES.items()
            for name, text in _texts(self._host.controllers.get(controller), cgroup, names)
        }
        return parse_v1(files) if files else None

    def _processes(self, cgroup: str) -> int:
        """In one hierarchy: a container's processes are in the same place of each."""
        if not cgroup:
            return 0
        root = self._host.controllers.get("pids") or next(iter(self._host.hierarchies), None)
        if root is None:
            return 0
        lists = (_text(f"{directory}/cgroup.procs", pages=True) for directory, _, _ in os.walk(root / cgroup))
        return sum(len(text.split()) for text in lists if text is not None)


def _pod_key(pod_id: str) -> str:
    """A pod's own container has the id of the pod."""
    return f"pod {pod_id}"


def _interfaces() -> tuple[Interface, ...]:
    return parse_net_dev(_PROC_NET_DEV.read_text(encoding="utf-8", errors="replace"))


def _texts(root: Path | None, cgroup: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What can be read of these files. The kernel lacks some by version, by boot option, and for what is gone, all."""
    if root is None:
        return
    for name in names:
        text = _text(f"{root}/{cgroup}/{name}")
        if text is not None:
            yield name, text


def _text(path: str, *, pages: bool = False) -> str | None:
    """A file of figures comes in one read, a list of processes in `pages`."""
    # Plain system calls: hundreds of small files are read at a time, and `open` costs three times as much.
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(fd, _FILE_BYTES)
            while pages and (page := os.read(fd, _FILE_BYTES)):
                data += page
            return data.decode("ascii", "replace")
        finally:
            os.close(fd)
    return None
