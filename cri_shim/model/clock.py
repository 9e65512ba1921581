"""Timestamps for records: Unix nanoseconds, strictly increasing, so that creation order is never ambiguous."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """Wraps a time source; two calls never return the same value."""

    def __init__(self, source: Callable[[], int]) -> None:
        self._source = source
        self._last = 0

    def now(self) -> int:
        """Now, and later than every earlier answer."""
        self._last = max(self._source(), self._last + 1)
        return self._last
