"""What a running guest uses, read by other threads: the CPU clock of its thread and the size of its memory.

Not for limits. Invariant: the engine's memory is touched only between `attach` and `end`, while its store is open.
"""

from __future__ import annotations

import ctypes
import threading
import time
from dataclasses import dataclass

import wasmtime

from cri_shim.kernel import libc


@dataclass(frozen=True, slots=True)
class Metered:
    """CPU time in ns since the start, linear memory in bytes."""

    cpu_ns: int = 0
    memory: int = 0


class Meter:
    """`begin`, `attach` and `end` are called by the guest's thread, `read` by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clock: int | None = None
        self._memory: tuple[wasmtime.Store, wasmtime.Memory] | None = None
        self._last = Metered()

    def begin(self) -> None:
        """The calling thread is the guest's."""
        with self._lock:
            self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def attach(self, store: wasmtime.Store, memory: object) -> None:
        """The guest has a memory, if it is one."""
        if isinstance(memory, wasmtime.Memory):
            with self._lock:
                self._memory = (store, memory)

    def end(self) -> None:
        """The store will be closed and the thread will end. The CPU time stays what it is."""
        with self._lock:
            self._last = Metered(cpu_ns=self._cpu())
            self._clock = self._memory = None

    def read(self) -> Metered:
        """At present."""
        with self._lock:
            if self._clock is None:
                return self._last
            memory = self._memory[1].data_len(self._memory[0]) if self._memory is not None else 0
            return Metered(self._cpu(), memory)

    def resident(self) -> int:
        """Bytes of the memory that are there: most of it may never have been touched. Longer for much memory."""
        with self._lock:
            if self._memory is None:
                return 0
            store, memory = self._memory
            address = ctypes.addressof(memory.data_ptr(store).contents)
            return libc.resident(address, memory.data_len(store))

    def cpu_ns(self) -> int:
        """CPU time only."""
        with self._lock:
            return self._cpu()

    def _cpu(self) -> int:
        return self._last.cpu_ns if self._clock is None else time.clock_gettime_ns(self._clock)
