"""Blobs by digest, in the form of an OCI image layout: manifests, configs, Wasm modules, layers on their way.

It does not know which blobs are needed: `cri_shim.flows.image_gc` does. Invariant: a file below `blobs/` has the size
and the digest that its name says. A partial is the beginning of a blob, as it came: it is hashed again before it is
gone on with, and what is read from it is not trusted before the whole blob has been verified.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import threading
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from cri_shim.adapters.full_disk import disk_errors
from cri_shim.adapters.shielded import to_the_end
from cri_shim.kernel import fs
from cri_shim.model.errors import ResourceExhausted
from cri_shim.model.ids import Digest
from cri_shim.model.layout import Layout
from cri_shim.wire.registry import Failure, RegistryError

_LAYOUT_FILE: Final = b'{"imageLayoutVersion": "1.0.0"}\n'
_CHUNK: Final = 1 << 20
_NAME: Final = re.compile("[0-9a-f]{64}")


class WrongContentError(RegistryError):
    """What came is not what its digest says; the partial is gone. `pieced`: it came over several connections."""

    def __init__(self, cause: str, *, pieced: bool) -> None:
        super().__init__(Failure.OTHER, cause)
        self.pieced = pieced


class Content:
    """The blob directory. What is there is known from memory after `open`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sizes: dict[Digest, int] = {}
        self._partials: dict[Digest, int] = {}
        self._arriving: dict[Digest, Ingest] = {}

    async def open(self) -> None:
        """Make the directories and read which blobs and partials there are."""
        self._sizes, self._partials = await asyncio.to_thread(self._scan)

    def has(self, digest: Digest) -> bool:
        """True for a verified blob."""
        return digest in self._sizes

    def size(self, digest: Digest) -> int | None:
        """Bytes of a blob, None when it is not there."""
        return self._sizes.get(digest)

    def digests(self) -> tuple[Digest, ...]:
        """All blobs."""
        return tuple(self._sizes)

    def partials(self) -> Mapping[Digest, int]:
        """Bytes of each blob whose download has begun and not ended."""
        return self._partials | {digest: ingest.received for digest, ingest in self._arriving.items()}

    def arriving(self) -> Mapping[Digest, tuple[int, int]]:
        """Of each blob that is being fetched now: the bytes that are here, and all."""
        return {digest: (ingest.received, ingest.size) for digest, ingest in self._arriving.items()}

    def usage(self) -> tuple[int, int]:
        """Bytes and number of files, partials included."""
        partials = self.partials()
        return sum(self._sizes.values()) + sum(partials.values()), len(self._sizes) + len(partials)

    def path(self, digest: Digest) -> Path:
        """Where a blob is, if `has` says that it is there."""
        return self._layout.blob(digest)

    async def read(self, digest: Digest) -> bytes:
        """A small blob as a whole."""
        return await asyncio.to_thread(self.path(digest).read_bytes)

    async def damage(self, digest: Digest) -> str:
        """Read a blob anew: what is wrong with it, empty when nothing is."""
        hashed, size, path = hashlib.sha256(), 0, self.path(digest)
        try:
            # A piece at a time, so that a caller who is cancelled waits for one piece only.
            while piece := await asyncio.to_thread(_piece, path, size):
                await asyncio.to_thread(hashed.update, piece)
                size += len(piece)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if size != self.size(digest):
            return f"has {size} bytes, not {self.size(digest)}"
        return "" if f"sha256:{hashed.hexdigest()}" == digest else "is not what its digest says"

    async def strangers(self) -> list[Path]:
        """Files in the blob directory that are no blobs known to be there."""
        known = {path.name for path in map(self.path, self._sizes)}
        directory = self._layout.images / "blobs" / "sha256"
        return await asyncio.to_thread(lambda: [path for path in directory.iterdir() if path.name not in known])

    async def put(self, digest: Digest, data: bytes) -> None:
        """Keep bytes whose digest the caller has computed."""
        if self.has(digest):
            return
        with disk_errors(self._layout.root):
            await to_the_end(self._put(digest, data))

    async def _put(self, digest: Digest, data: bytes) -> None:
        await asyncio.to_thread(fs.atomic_write, self.path(digest), data)
        self._sizes[digest] = len(data)

    @contextlib.asynccontextmanager
    async def ingest(self, digest: Digest, size: int, what: str) -> AsyncGenerator[Ingest]:
        """Take in a blob, from where the last one left off; `what` names it in errors. One at a time for each blob.

        What was received and not committed is kept at the end of the block, unless it was discarded.
        """
        ingest = Ingest(self._layout, digest, size, what)
        try:
            with disk_errors(self._layout.root):
                await to_the_end(asyncio.to_thread(ingest.open))
                self._arriving[digest] = ingest
                self._partials.pop(digest, None)
                yield ingest
        except ResourceExhausted:
            await to_the_end(asyncio.to_thread(ingest.discard))  # others need the room more
            raise
        finally:
            await to_the_end(asyncio.to_thread(ingest.close))
            self._arriving.pop(digest, None)
            if ingest.received and not self.has(digest):
                self._partials[digest] = ingest.received

    async def commit(self, ingest: Ingest) -> None:
        """Make visible what has been verified."""
        with disk_errors(self._layout.root):
            await to_the_end(self._commit(ingest))

    async def _commit(self, ingest: Ingest) -> None:
        await asyncio.to_thread(ingest.finish)
        self._sizes[ingest.digest] = ingest.received

    async def delete(self, digests: Iterable[Digest]) -> None:
        """Remove blobs and partials; absent is success."""
        paths = [self.path(digest) for digest in digests if self._sizes.pop(digest, None) is not None]
        paths += [self._layout.partial(digest) for digest in digests if self._partials.pop(digest, None) is not None]
        if paths:
            await asyncio.to_thread(_unlink, paths)

    def _scan(self) -> tuple[dict[Digest, int], dict[Digest, int]]:
        blobs = self._layout.images / "blobs" / "sha256"
        marker = self._layout.images / "oci-layout"
        blobs.mkdir(parents=True, exist_ok=True)
        self._layout.partials.mkdir(parents=True, exist_ok=True)
        for scratch in self._layout.images.glob(".*"):
            scratch.unlink()  # of an atomic write that was cut short
        if not marker.exists():
            fs.atomic_write(marker, _LAYOUT_FILE)
        return _sizes(blobs), _sizes(self._layout.partials)


def _sizes(directory: Path) -> dict[Digest, int]:
    """Of the files that are named as digests are; what an atomic write left when it was cut short is removed."""
    sizes: dict[Digest, int] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name) is None:
                Path(entry.path).unlink()
            else:
                sizes[Digest(f"sha256:{entry.name}")] = entry.stat().st_size
    return sizes


def _piece(path: Path, offset: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.pread(fd, 4 * _CHUNK, offset)
    finally:
        os.close(fd)


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


class Arrival:
    """A blob for a reader that does not wait for its end: the file, and a pipe that says when there is more of it.

    `begun` is set when `file` can be read. The end of the pipe is the end of the file: `complete` says that all of it
    has been verified.
    """

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.file = -1
        self.progress, self._bell = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._bell, False)
        self._lock = threading.Lock()

    def begin(self, path: Path) -> None:
        """The file is there."""
        if not self.begun.is_set():
            self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self.begun.set()

    def more(self) -> None:
        """There is more of it. From any thread."""
        with self._lock, contextlib.suppress(BlockingIOError, BrokenPipeError):
            if self._bell >= 0:
                os.write(self._bell, b".")

    def complete(self) -> None:
        """There is no more to come."""
        with self._lock:
            bell, self._bell = self._bell, -1
        if bell >= 0:
            os.close(bell)

    def close(self) -> None:
        """Let go of everything; who reads has its own descriptors."""
        self.complete()
        for fd in (self.file, self.progress):
            if fd >= 0:
                os.close(fd)
        self.file = self.progress = -1


class Ingest:
    """A blob on its way to the disk. All methods block: call them in a thread, one after the other."""

    def __init__(self, layout: Layout, digest: Digest, size: int, what: str) -> None:
        self.digest = digest
        self.size = size
        self.what = what
        """Its name in errors."""
        self.received = 0
        self.connections = 0
        """How many answers its bytes are of, earlier daemons' as one."""
        self.etag: tuple[str, str] = ("", "")
        """Which host has given it what ETag."""
        self.arrival: Arrival | None = None
        self._layout = layout
        self._fd = -1
        self._hash = hashlib.sha256()

    @property
    def partial(self) -> Path:
        """The file."""
        return self._layout.partial(self.digest)

    def open(self) -> None:
        """Hash what is there already."""
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(self._fd).st_size > self.size:
            os.ftruncate(self._fd, 0)
        while chunk := os.read(self._fd, _CHUNK):
            self._hash.update(chunk)
            self.received += len(chunk)
        self.connections = 1 if self.received else 0

    def write(self, chunks: Sequence[bytes]) -> None:
        """Append. WrongContentError as soon as there is more than there should be."""
        if self.received + sum(len(chunk) for chunk in chunks) > self.size:
            raise self.wrong(f"the registry sends more than the {self.size} bytes that the manifest says")
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                written = os.write(self._fd, rest)
                self._hash.update(rest[:written])
                self.received += written
                rest = rest[written:]
        if self.arrival is not None:
            self.arrival.more()

    def verify(self) -> None:
        """WrongContentError unless all is there and as its digest says."""
        if self.received != self.size:
            raise self.wrong(f"expected {self.size} bytes, the registry sent {self.received}")
        actual = f"sha256:{self._hash.hexdigest()}"
        if actual != self.digest:
            raise self.wrong(f"expected content with digest {self.digest}, the registry sent {actual}")

    def wrong(self, reason: str, *, pieced: bool = False) -> WrongContentError:
        """Remove what has been received: none of it can be trusted."""
        error = WrongContentError(f"{self.what}: {reason}", pieced=pieced or self.connections > 1)
        self.discard()
        return error

    def finish(self) -> None:
        """Move to its place."""
        self.partial.rename(self._layout.blob(self.digest))

    def discard(self) -> None:
        """Remove the partial; gone is success."""
        self.close()
        self.partial.unlink(missing_ok=True)
        self.received = 0

    def close(self) -> None:
        """Keep what has been received; nothing received leaves nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if not self.received:
                self.partial.unlink(missing_ok=True)
