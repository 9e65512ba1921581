"""Blobs by digest, in the form of an OCI image layout: manifests, configs, Wasm modules, layers on their way.

It does not know which blobs are needed: `cri_shim.flows.image_gc` does. Invariant: a file below `blobs/` has the size
and the digest that its name says; everything else is a partial, which nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import itertools
import os
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cri_shim.kernel import fs
from cri_shim.model.errors import PullError, ResourceExhausted
from cri_shim.model.ids import Digest, digest_hex
from cri_shim.model.layout import Layout

_LAYOUT_FILE: Final = b'{"imageLayoutVersion": "1.0.0"}\n'
_CHUNK: Final = 1 << 20
NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextlib.contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn "disk full" into a ResourceExhausted that names the file system."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_full(path) from error
        raise


def disk_full(path: Path) -> ResourceExhausted:
    """The error for a file system without room."""
    hint = "remove images that are not used, or give it more space"
    return ResourceExhausted(f"no space left on the file system of {path}", hint=hint)


class Content:
    """The blob directory. What is there is known from memory after `open`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sizes: dict[Digest, int] = {}
        self._attempts = itertools.count()

    async def open(self) -> None:
        """Make the directories and read which blobs there are; what was being fetched is thrown away."""
        self._sizes = await asyncio.to_thread(self._scan)

    def has(self, digest: Digest) -> bool:
        """True for a verified blob."""
        return digest in self._sizes

    def size(self, digest: Digest) -> int | None:
        """Bytes of a blob, None when it is not there."""
        return self._sizes.get(digest)

    def digests(self) -> tuple[Digest, ...]:
        """All blobs."""
        return tuple(self._sizes)

    def usage(self) -> tuple[int, int]:
        """Bytes and number of files."""
        return sum(self._sizes.values()), len(self._sizes)

    def path(self, digest: Digest) -> Path:
        """Where a blob is, if `has` says that it is there."""
        return self._layout.blob(digest)

    async def read(self, digest: Digest) -> bytes:
        """A small blob as a whole."""
        return await asyncio.to_thread(self.path(digest).read_bytes)

    async def put(self, digest: Digest, data: bytes) -> None:
        """Keep bytes whose digest the caller has computed."""
        if self.has(digest):
            return
        with disk_errors(self._layout.root):
            await asyncio.to_thread(fs.atomic_write, self.path(digest), data)
        self._sizes[digest] = len(data)

    def ingest(self, digest: Digest, size: int, what: str) -> Ingest:
        """Begin to take in a blob; `what` names it in errors."""
        partial = self._layout.partials / f"{digest_hex(digest)}.{next(self._attempts)}"
        return Ingest(_Target(self._layout, digest, size, what), partial)

    async def commit(self, ingest: Ingest) -> None:
        """Verify what was taken in and make it visible. PullError says what differs."""
        with disk_errors(self._layout.root):
            await asyncio.to_thread(ingest.finish)
        self._sizes[ingest.digest] = ingest.received

    async def delete(self, digests: Iterable[Digest]) -> None:
        """Remove blobs; absent is success."""
        gone = [digest for digest in digests if self._sizes.pop(digest, None) is not None]
        if gone:
            await asyncio.to_thread(self._unlink, gone)

    def _unlink(self, digests: Sequence[Digest]) -> None:
        for digest in digests:
            self.path(digest).unlink(missing_ok=True)

    def _scan(self) -> dict[Digest, int]:
        blobs = self._layout.images / "blobs" / "sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        self._layout.partials.mkdir(parents=True, exist_ok=True)
        for partial in self._layout.partials.iterdir():
            partial.unlink()
        marker = self._layout.images / "oci-layout"
        if not marker.exists():
            fs.atomic_write(marker, _LAYOUT_FILE)
        sizes: dict[Digest, int] = {}
        for entry in os.scandir(blobs):
            if entry.name.startswith("."):
                Path(entry.path).unlink()  # an atomic write that was cut short
            else:
                sizes[Digest(f"sha256:{entry.name}")] = entry.stat().st_size
        return sizes


@dataclass(frozen=True, slots=True)
class _Target:
    layout: Layout
    digest: Digest
    size: int
    what: str


class Ingest:
    """A blob on its way to the disk. All methods block: call them in a thread, one after the other."""

    def __init__(self, target: _Target, partial: Path) -> None:
        self._target = target
        self._partial = partial
        self._fd = -1
        self._hash = hashlib.sha256()
        self.received = 0

    @property
    def digest(self) -> Digest:
        """What the content must be."""
        return self._target.digest

    @property
    def size(self) -> int:
        """How long it must be."""
        return self._target.size

    @property
    def what(self) -> str:
        """Its name in errors."""
        return self._target.what

    def write(self, chunks: Sequence[bytes]) -> None:
        """Append; PullError as soon as there is more than there should be."""
        self.received += sum(len(chunk) for chunk in chunks)
        if self.received > self.size:
            msg = f"{self.what}: the registry sends more than the {self.size} bytes that the manifest says"
            raise PullError(msg)
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._partial, flags, 0o600)
        for chunk in chunks:
            self._hash.update(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(self._fd, rest) :]

    def restart(self) -> None:
        """Forget what has been received."""
        self.discard()
        self._hash = hashlib.sha256()
        self.received = 0

    def finish(self) -> None:
        """Verify size and digest, then move to its place."""
        self.write(())  # an empty blob has not opened its file
        if self.received != self.size:
            msg = f"{self.what}: expected {self.size} bytes, the registry sent {self.received}"
            raise PullError(msg)
        actual = f"sha256:{self._hash.hexdigest()}"
        if actual != self.digest:
            msg = f"{self.what}: expected content with digest {self.digest}, the registry sent {actual}"
            raise PullError(msg)
        os.close(self._fd)
        self._fd = -1
        self._partial.rename(self._target.layout.blob(self.digest))

    def discard(self) -> None:
        """Remove the partial; gone is success."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._partial.unlink(missing_ok=True)
