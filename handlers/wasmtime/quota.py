"""CPU quota and period of the CRI for guests in threads of the daemon, held without a cgroup.

    one thread, every 10 ms: CPU clock of each guest that computes ─▶ in debt? ─▶ its engine's epoch
    the guest, at its next loop or call: the epoch's callback sleeps the debt off

Not for workers, which have a cgroup. CPU time that the engine spends for a guest on threads of its own (file calls) is
not counted. Invariant: over time a guest gets no more than its quota; one that sleeps costs nothing.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Final, Protocol

_INTERVAL: Final = 0.01
"""Seconds between two looks; a guest overdraws by that much at most, and pays for it."""
_DEFAULT_PERIOD: Final = 100_000
"""Microseconds (kernel, Documentation/scheduler/sched-bwc.rst)."""


@dataclass(frozen=True, slots=True)
class CpuLimit:
    """A quota per period, both in µs, as the CRI has them."""

    quota: int
    period: int = _DEFAULT_PERIOD


@dataclass(slots=True)
class Allowance:
    """A bucket of CPU time that fills at the limit's rate up to one quota. All times in ns."""

    limit: CpuLimit
    at: int
    used: int
    _left: float = field(init=False)

    def __post_init__(self) -> None:
        self._left = self.limit.quota * 1000

    def debt(self, now: int, used: int) -> int:
        """How long to wait until the CPU time used so far is paid for; 0 = go on."""
        rate = self.limit.quota / self.limit.period
        filled = min(self._left + (now - self.at) * rate, self.limit.quota * 1000)
        self._left = filled - (used - self.used)
        self.at, self.used = now, used
        return 0 if self._left >= 0 else int(-self._left / rate)


class Limited(Protocol):
    """A guest with a quota. Called by the throttle's thread."""

    def account(self, now: int) -> None:
        """Look at the guest's CPU clock. `now` is `time.monotonic_ns()`."""
        ...


class Throttle:
    """The thread that looks. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._computing: set[Limited] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self) -> None:
        """Start the thread unless it runs. It takes its weight from the thread that calls: not from a guest's."""
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="wasm-throttle", daemon=True)
                self._thread.start()

    def computes(self, guest: Limited) -> None:
        """Look at the guest from now on."""
        with self._changed:
            self._computing.add(guest)
            self._changed.notify()

    def rests(self, guest: Limited) -> None:
        """It sleeps or has ended: look no more. Twice is success."""
        with self._changed:
            self._computing.discard(guest)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._computing and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                guests = tuple(self._computing)
            now = time.monotonic_ns()
            for guest in guests:
                guest.account(now)
            time.sleep(_INTERVAL)
