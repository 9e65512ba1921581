"""Compiling the modules of images when these come, so that no container has to wait for it.

Beside pulls and loads, which do not wait: one module at a time, and a module that is too large or cannot be compiled
costs a line in the log. Not the compiler, which a handler has (`CompilesAhead`). Invariant: what is not done here the
first container of the image does, with the same result.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cri_shim.adapters import rootfs
from cri_shim.adapters.compiled_modules import CompiledModules
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.store import Table
from cri_shim.log import get_logger
from cri_shim.model.errors import CriShimError
from cri_shim.model.handler import CompilesAhead, Handler
from cri_shim.model.ids import Digest, ImageId
from cri_shim.model.image import ImageRecord, LayerRecord
from cri_shim.model.layout import Layout
from cri_shim.spec.wasm_entry import wasm_entry

log = get_logger()

_MAX_BYTES: Final = 64 << 20
_MAX_WAITING: Final = 256


@dataclass(slots=True)
class CompileAhead:
    """Takes images; `handlers` are those that there are, of which the first that can compiles for all."""

    layout: Layout
    images: Table[ImageId, ImageRecord]
    layers: Table[Digest, LayerRecord]
    modules: CompiledModules
    handlers: Iterable[Handler]
    _waiting: asyncio.Queue[ImageId] = field(default_factory=lambda: asyncio.Queue(_MAX_WAITING))
    _worker: asyncio.Task[None] | None = None

    def __call__(self, image: ImageRecord) -> None:
        """Have the module of an image compiled, if it has one, some time soon. Returns at once."""
        if image.wasm is None and wasm_entry(image) is None:
            return
        try:
            self._waiting.put_nowait(image.id)
        except asyncio.QueueFull:
            log.warning("module not compiled ahead: too many are waiting", image=_name(image))

    def start(self) -> None:
        """Begin, with those first that an earlier daemon has not come to."""
        for image in self.images.values():
            if not any(map(self.modules.size, image.modules)):
                self(image)
        self._worker = asyncio.create_task(self._work())

    async def drain(self) -> None:
        """Wait until nothing waits."""
        await self._waiting.join()

    async def aclose(self) -> None:
        """Stop, in the middle of whatever it is."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait((self._worker,))

    async def _work(self) -> None:
        while True:
            image = self.images.get(await self._waiting.get())
            if image is not None:  # else it has gone meanwhile
                try:
                    await self._compile(image)
                except (CriShimError, OSError) as error:
                    log.warning("module not compiled ahead", image=_name(image), error=str(error))
            self._waiting.task_done()

    async def _compile(self, image: ImageRecord) -> None:
        compiler = next((handler for handler in self.handlers if isinstance(handler, CompilesAhead)), None)
        if compiler is None:
            return
        module = await asyncio.to_thread(self._open, image)
        if module is None:
            return
        with contextlib.closing(os.fdopen(module, "rb")) as file:
            size = os.fstat(module).st_size
            if size > _MAX_BYTES:
                log.warning("module not compiled ahead: it is too large", image=_name(image), bytes=size)
                return
            hashed = await asyncio.to_thread(hashlib.file_digest, file, "sha256")
            digest = Digest(f"sha256:{hashed.hexdigest()}")
            user = f"ahead {image.id}"
            await self.modules.use(user, digest, image.id)
            try:
                await compiler.compile_ahead(Path(f"/proc/self/fd/{module}"), digest, _name(image))
            finally:
                await to_the_end(self.modules.release(user))

    def _open(self, image: ImageRecord) -> int | None:
        """A descriptor of the module: of the image's own, or of the file that it would run."""
        if image.wasm is not None:
            return os.open(self.layout.blob(image.wasm.digest), os.O_RDONLY | os.O_CLOEXEC)
        entry = wasm_entry(image)
        layers = [layer for key in image.layers if (layer := self.layers.get(key)) is not None]
        if entry is None or not layers or len(layers) != len(image.layers):
            return None
        return rootfs.open_module(self.layout, layers, entry)


def _name(image: ImageRecord) -> str:
    return next(iter((*image.repo_tags, *image.repo_digests)), image.id)
