"""Compiling modules: each once, in a child of the zygote, to a file that is mapped at every start.

Not where they are kept, nor for how long (`cri_shim.adapters.compiled_modules`). Compiled code is trusted, so only this
daemon's user may write that directory. Invariant: a module that cannot be compiled is not tried again by this daemon,
and one that takes long holds up none that does not.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Final

from cri_shim.adapters.compiled_modules import CompiledModules
from cri_shim.adapters.full_disk import NO_SPACE, disk_full
from cri_shim.adapters.pace import Pace
from cri_shim.adapters.zygote import TaskEndedError, TaskError, Zygote
from cri_shim.kernel import fs
from cri_shim.kernel.pauses import load
from cri_shim.model.errors import CriShimError, DeadlineExceeded, FailedPrecondition, InvalidArgument
from cri_shim.model.ids import Digest
from handlers.wasmtime.ending import shorten
from handlers.wasmtime.guest_spec import Entry

_TASK: Final = "handlers.wasmtime.compile:compile_module"
_ENGINE: Final = "wasmtime-"
_MEMORY: Final = 1 << 30
_MEMORY_PER_BYTE: Final = 64
_MOST_MEMORY: Final = 4 << 30
"""Bytes of address space, by the size of the module: 9 MB of Go take 0.7 GiB of the 1.5 GiB that they may."""
_CPU_SECONDS: Final = 300
"""19 MB of Go take 20 of them."""
_AHEAD_CPU_SECONDS: Final = 60
"""Nobody waits for it, so that a bomb in an image is not to take more of the node than it has to."""
_TIMEOUT: Final = 600.0
_AT_ONCE: Final = 2
_PATIENCE_SECONDS: Final = 10.0
"""What takes longer leaves its turn to others, and goes on."""
_MOST: Final = 4
"""Compilers for containers that wait; those ahead have one of their own (`cri_shim.flows.image_compile`)."""
_DIED: Final = frozenset({signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGSEGV})
_REMEMBERED: Final = 256


class _TooLongError(FailedPrecondition):
    """It was not compiled within so many seconds of CPU time."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the module was not compiled within {seconds} s of CPU time")
        self.seconds = seconds


class ModuleCache:
    """`path` and `compile` name the same file; `path` may block, `compile` makes it when it is missing."""

    def __init__(self, modules: CompiledModules, zygote: Zygote) -> None:
        self._modules = modules
        self._zygote = zygote
        self._turns = Pace(_AT_ONCE, _PATIENCE_SECONDS)
        self._places = asyncio.Semaphore(_MOST)
        self._refused: dict[Digest, Callable[[], CriShimError]] = {}
        self._retired = False

    @cached_property
    def _engine(self) -> str:
        load("handlers.wasmtime.engine")
        from handlers.wasmtime.engine import engine_key  # noqa: PLC0415  loads the engine

        return engine_key()

    def path(self, entry: Entry) -> Path:
        """Where the compiled module is or will be. The first call loads the engine."""
        path = self._modules.path(self._engine, entry.digest)
        own = self._modules.own(self._engine)
        return own / path.name if Path(entry.path).parent == own else path

    def forwarding(self) -> tuple[Entry, Entry]:
        """The two modules of `handlers.wasmtime.forward`, front and back, ready to be compiled. Blocks."""
        import wasmtime  # noqa: PLC0415  the engine is loaded here if it has not been

        from handlers.wasmtime.forward import back_text, front_text  # noqa: PLC0415  they are wanted here only

        front, back = (bytes(wasmtime.wat2wasm(text)) for text in (front_text(), back_text()))
        return self._own_module(front), self._own_module(back)

    def _own_module(self, code: bytes) -> Entry:
        digest = hashlib.sha256(code).hexdigest()
        path = self._modules.own(self._engine) / f"{digest}.wasm"
        if not path.exists():
            self._modules.make_directory(path.parent)
            fs.atomic_write(path, code, 0o600)
        return Entry(str(path), Digest(f"sha256:{digest}"), "")

    async def compile(self, entry: Entry, *, seen: bool = False, ahead: bool = False) -> Path:
        """Make the file, unless it is there, and say where.

        `seen`: the caller has just found it at `path`; `ahead`: no container waits for it.

        InvalidArgument, with the engine's words, when the module is not valid; FailedPrecondition when it takes more
        time or memory than a compiler may.
        """
        refused = self._refused.get(entry.digest)
        if refused is not None:
            raise refused()
        if not self._retired:
            engine = await asyncio.to_thread(lambda: self._engine)
            self._retired = True
            await self._modules.retire(engine, _ENGINE)
        target = self.path(entry)
        if not (seen and self._modules.keeps(target)):
            await self._make(entry, target, ahead=ahead)
        return target

    async def _make(self, entry: Entry, target: Path, *, ahead: bool) -> None:
        make = partial(self._compile_ahead, entry) if ahead else partial(self._compile, entry)
        while True:
            try:
                await self._modules.make(target, make)
            except _TooLongError as error:
                if ahead or error.seconds == _CPU_SECONDS:
                    raise
                # It was compiled ahead when this container came: now it gets the time of one that is waited for.
            else:
                return

    async def _compile_ahead(self, entry: Entry, target: Path) -> int:
        return await self._run(entry, target, _AHEAD_CPU_SECONDS)

    async def _compile(self, entry: Entry, target: Path) -> int:
        async with self._places, self._turns.turn():
            return await self._run(entry, target, _CPU_SECONDS)

    async def _run(self, entry: Entry, target: Path, seconds: int) -> int:
        fd = await asyncio.to_thread(os.open, entry.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return await self._run_on(fd, entry, target, seconds)
        finally:
            os.close(fd)

    async def _run_on(self, fd: int, entry: Entry, target: Path, seconds: int) -> int:
        memory = min(_MOST_MEMORY, _MEMORY + _MEMORY_PER_BYTE * os.fstat(fd).st_size)
        too_much = f"the module takes more than {memory >> 20} MiB of memory to compile"
        arguments = {
            "digest": entry.digest,
            "component": entry.component,
            "target": str(target),
            "memory": memory,
            "seconds": seconds,
        }
        try:
            result = await self._zygote.run(_TASK, arguments, (fd,), timeout=_TIMEOUT)
        except TaskError as error:
            if error.type == "WasmtimeError":
                words = " ".join(error.text.split()).replace(" Caused by:", ":")
                msg = f"the module cannot be compiled: {shorten(words)}"
                raise self._refuse(entry, partial(InvalidArgument, msg)) from None
            if error.errno in NO_SPACE:
                raise disk_full(target.parent) from None
            if error.type == MemoryError.__name__:
                raise self._refuse(entry, partial(FailedPrecondition, too_much)) from None
            raise
        except TaskEndedError as error:
            if error.signal == signal.SIGXCPU:
                too_long = partial(_TooLongError, seconds)
                raise (self._refuse(entry, too_long) if seconds == _CPU_SECONDS else too_long()) from None
            if error.signal in _DIED:  # the engine's library knows no other answer when it gets no memory
                msg = f"{too_much}, or the engine has a defect: its compiler ended by {error.signal.name}"
                raise self._refuse(entry, partial(FailedPrecondition, msg)) from None
            raise
        except DeadlineExceeded:
            msg = f"the module was not compiled within {_TIMEOUT:g} s"
            raise FailedPrecondition(msg) from None
        return int(result["size"])

    def _refuse(self, entry: Entry, error: Callable[[], CriShimError]) -> CriShimError:
        """Remember it, for those who repeat the request for ever."""
        while len(self._refused) >= _REMEMBERED:
            del self._refused[next(iter(self._refused))]
        self._refused[entry.digest] = error
        return error()
