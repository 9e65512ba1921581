"""How much containers have written, measured in the background: no call ever waits for a walk over a tree.

Not for image layers, which are counted once. Invariant: one walk at a time, by a thread that gives way; a figure has
the time at which it was true.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from cri_shim.kernel import fs, threads
from cri_shim.model.ids import ContainerId
from cri_shim.model.layout import Layout
from cri_shim.spec.stats_messages import LayerUsage

_AGE_NS: Final = 9_000_000_000
"""A figure that is older is due; a bit less than the pause between two rounds."""
_STINT_SECONDS: Final = 0.002


class LayerSizes:
    """The latest figure for each container."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._latest: dict[ContainerId, LayerUsage] = {}

    def latest(self, container_id: ContainerId) -> LayerUsage | None:
        """None until it was measured for the first time."""
        return self._latest.get(container_id)

    def total(self) -> tuple[int, int]:
        """Bytes and inodes of all, as far as they have been measured."""
        usages = tuple(self._latest.values())
        return sum(usage.used_bytes for usage in usages), sum(usage.inodes for usage in usages)

    async def measure(self, running: Collection[ContainerId], resting: Mapping[ContainerId, int]) -> None:
        """Measure those whose figure is missing or old, and forget all others.

        What rests (made and not started, or ended) is measured once after the time, in Unix ns, since when it does.
        """
        self._latest = {key: usage for key, usage in self._latest.items() if key in running or key in resting}
        limit = time.time_ns() - _AGE_NS
        valid_from = {**resting, **dict.fromkeys(running, limit)}
        due = [key for key, at in valid_from.items() if (usage := self._latest.get(key)) is None or usage.at < at]
        if due:
            # The new ones first: what has a figure can wait.
            due.sort(key=lambda key: key in self._latest)
            await threads.await_in_new_thread(lambda: self._walk(due))

    def _walk(self, containers: Sequence[ContainerId]) -> None:
        pace = _Pace()
        for container_id in containers:
            used, inodes = fs.usage(self._layout.writable(container_id) / "upper", pace)
            self._latest[container_id] = LayerUsage(time.time_ns(), used, inodes)


class _Pace:
    """Rests as long as it has worked. Not by nice(2): a gentle thread that is preempted would keep the GIL."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self) -> None:
        worked = time.monotonic() - self._since
        if worked > _STINT_SECONDS:
            time.sleep(worked)
            self._since = time.monotonic()
