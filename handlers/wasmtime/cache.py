"""Compiled modules on disk, each made once by a child of the zygote and mapped at every start.

Not shared between machines: compiled code is trusted, so only this daemon's user may write the directory.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Final

from cri_shim.adapters.zygote import TaskError, Zygote
from cri_shim.kernel import fs
from cri_shim.model.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument
from cri_shim.model.ids import Digest, digest_hex
from handlers.wasmtime.guest_spec import Entry

_TASK: Final = "handlers.wasmtime.compile:compile_module"
_MEMORY: Final = 4 << 30
"""Bytes of address space: 19 MB of Wasm take a quarter of it."""
_CPU_SECONDS: Final = 300
_TIMEOUT: Final = 600.0
_AT_ONCE: Final = 2


class ModuleCache:
    """`path` and `compiled` name the same file; `path` may block, `compiled` makes it when it is missing."""

    def __init__(self, directory: Path, zygote: Zygote) -> None:
        self._directory = directory
        self._zygote = zygote
        self._running: dict[Path, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_AT_ONCE)

    @cached_property
    def _key(self) -> str:
        from handlers.wasmtime.engine import engine_key  # noqa: PLC0415  loads the engine

        return engine_key()

    def path(self, entry: Entry) -> Path:
        """Where the compiled module is or will be. The first call loads the engine."""
        return self._directory / self._key / f"{digest_hex(entry.digest)}.cwasm"

    def forwarding(self) -> tuple[Entry, Entry]:
        """The two modules of `handlers.wasmtime.forward`, front and back, ready to be compiled. Blocks."""
        import wasmtime  # noqa: PLC0415  the engine is loaded here if it has not been

        from handlers.wasmtime.forward import back_text, front_text  # noqa: PLC0415  they are wanted here only

        front, back = (bytes(wasmtime.wat2wasm(text)) for text in (front_text(), back_text()))
        return self._own_module(front), self._own_module(back)

    def _own_module(self, code: bytes) -> Entry:
        digest = hashlib.sha256(code).hexdigest()
        path = self._directory / f"{digest}.wasm"
        if not path.exists():
            self._directory.mkdir(mode=0o700, exist_ok=True)
            fs.atomic_write(path, code, 0o600)
        return Entry(str(path), Digest(f"sha256:{digest}"), "")

    async def compile(self, entry: Entry) -> None:
        """Make the file. Everybody who asks meanwhile shares the one run, which goes on when all of them have left.

        InvalidArgument, with the engine's words, when the module is not valid.
        """
        target = await asyncio.to_thread(self.path, entry)
        task = self._running.get(target)
        if task is None:
            task = asyncio.create_task(self._compile(entry, target))
            self._running[target] = task
            task.add_done_callback(lambda done: self._forget(target, done))
        await asyncio.shield(task)

    def _forget(self, target: Path, done: asyncio.Task[None]) -> None:
        del self._running[target]
        if not done.cancelled():
            done.exception()  # whoever still waits gets it; nobody has to

    async def _compile(self, entry: Entry, target: Path) -> None:
        async with self._slots:
            fd = await asyncio.to_thread(_open, entry, target)
            arguments = {
                "digest": entry.digest,
                "component": entry.component,
                "target": str(target),
                "memory": _MEMORY,
                "seconds": _CPU_SECONDS,
            }
            try:
                await self._zygote.run(_TASK, arguments, (fd,), timeout=_TIMEOUT)
            except TaskError as error:
                if error.type == "WasmtimeError":
                    msg = f"the module cannot be compiled: {' '.join(error.text.split())}"
                    raise InvalidArgument(msg) from None
                raise
            except DeadlineExceeded:
                msg = f"the module was not compiled within {_TIMEOUT:g} s"
                raise FailedPrecondition(msg) from None
            finally:
                os.close(fd)

    async def aclose(self) -> None:
        """Stop compiling."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)


def _open(entry: Entry, target: Path) -> int:
    # The cache's own root first: parents made by mkdir(parents=True) take the umask's mode.
    target.parent.parent.mkdir(mode=0o700, exist_ok=True)
    target.parent.mkdir(mode=0o700, exist_ok=True)
    return os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
