"""The course of a worker, some times over, in the zygote before its first fork.

What Python does the first times it writes down: code is specialised, where an attribute was found is remembered, so is
the layout of instances. Done here, no worker has a copy of those pages. Left out is what would change this process: its
namespaces, root and identity. Invariant: afterwards it has one thread, and the descriptors and the name that it had.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import wasmtime

from cri_shim.adapters.log_pump import LogPump
from cri_shim.kernel import libc
from cri_shim.model.container import Exit
from cri_shim.model.errors import CriShimError
from cri_shim.model.ids import ContainerId
from handlers.wasmtime.engine import Made, new_engine
from handlers.wasmtime.guest import Services
from handlers.wasmtime.quota import Throttle
from handlers.wasmtime.worker import NOBODY, NOTHING, SPECS, Worker, move_into, prepare_worker

_LARGEST: Final = 512
"""Bytes; what is larger is the C library's."""
_ALIGNMENT: Final = 16
_POOL: Final = 16 << 10
_POOL_HEADER: Final = 64
"""Bytes at most."""
_ENOUGH: Final = 64 << 10
"""Bytes of each size, where memory is managed otherwise."""
_filling: Final[list[bytes]] = []
_TIMES: Final = 12
"""Python 3.11 specialises what has run eight times, later ones earlier."""
_GUEST: Final = """
(module
  (func $poll (import "wasi_snapshot_preview1" "poll_oneoff") (param i32 i32 i32 i32) (result i32))
  (memory (export "memory") 1)
  (func (export "_start")
    (i64.store (i32.const 24) (i64.const 1000))
    (i32.store (i32.const 16) (i32.const 1))
    (drop (call $poll (i32.const 0) (i32.const 64) (i32.const 1) (i32.const 128)))))
"""
"""Sleeps for a microsecond. It writes nothing: the engine has threads for that."""


class _Over(Exception):
    """The guest has ended."""


def rehearse() -> None:
    """Also leaves the heaps without gaps: what a worker allocates is to lie together.

    Workers can do without: a failure is told on standard error, and nothing more.
    """
    name = Path("/proc/self/comm")
    before = name.read_bytes().removesuffix(b"\n")
    spec = msgspec.json.encode(msgspec.structs.replace(NOTHING, worker=NOBODY, argv=("",), env=(("", ""),)))
    try:
        with open(_compiled(), "rb") as module:
            for _ in range(_TIMES):
                _run(spec, f"/proc/self/fd/{module.fileno()}")
    except Exception as error:  # noqa: BLE001  whatever it is
        sys.stderr.write(f"Wasm workers will need more memory: {type(error).__name__}: {error}\n")
    name.write_bytes(before)  # the guest's thread had taken another
    gc.collect()
    libc.fill_heap()
    _fill_pools()


def _fill_pools() -> None:
    """Take what is free in the pools that Python has small objects in, one size after the other (obmalloc.c)."""
    for size in range(_LARGEST, sys.getsizeof(b""), -_ALIGNMENT):
        for _ in range(_ENOUGH // size):
            _filling.append(filler := bytes(size - sys.getsizeof(b"")))
            if id(filler) % _POOL < _POOL_HEADER:  # the first one of a new pool
                break


def _compiled() -> int:
    """A descriptor of the guest, compiled in a process of its own, as any other."""
    module = os.memfd_create("rehearsal", os.MFD_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.write(module, wasmtime.Module(new_engine(), _GUEST).serialize())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return module


def _run(spec: bytes, compiled: str) -> None:
    with ExitStack() as opened:
        ends = [end for _ in range(2) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
        daemon, worker, listener, _ = (opened.enter_context(end) for end in ends)
        daemon.send(b"go")
        prepared = prepare_worker(_services)
        opened.enter_context(prepared.held)
        opened.callback(prepared.pump.close)
        prepared.worker.begin(worker.fileno(), listener.fileno(), -1)
        move_into(os.devnull)
        prepared.guest.assign(ContainerId("rehearsal"), SPECS.decode(spec), compiled, prepared.program)
        with suppress(_Over):
            prepared.worker.serve(prepared.guest, prepared.pump, _here)


def _services(worker: Worker, pump: LogPump, made: Made) -> Services:
    return Services(pump, Throttle(), _Told(worker), made=lambda: made, thread=_here)


def _here(run: Callable[[], None]) -> None:
    run()


@dataclass(frozen=True, slots=True)
class _Told:
    """`handlers.wasmtime.guest.Told`."""

    worker: Worker

    def started(self, at: int) -> None:
        self.worker.started(at)

    def failed(self, error: CriShimError) -> None:
        raise error

    def ended(self, ended: Exit) -> None:
        del ended
        raise _Over
