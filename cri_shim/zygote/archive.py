"""The tasks that look into an archive of images (`docker save`, OCI): what is where in it, and the digest of a part.

Not an extraction: nothing is written, and no name of the archive ever becomes a path of this machine. Invariant: memory
and time are bounded, whatever the archive says: by the number of its members and by the length of their names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

from cri_shim.wire.layer_tar import BLOCK, Entry, EntryReader, Kind, LayerFormatError, contained_path, padded
from cri_shim.zygote.stream import Growing, LayerStream

MAX_MEMBERS = 20_000
_MAX_NAME = 1024
_HEAD = 8
_CHUNK = 1 << 20


def index(arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """The members of the archive `fds[0]`, which can be sought in.

    `files`: name → [offset, size, the first bytes in hex]; `links`: name → the name it stands for.
    """
    del arguments
    archive = fds[0]
    end = os.fstat(archive).st_size
    files: dict[str, tuple[int, int, str]] = {}
    links: dict[str, str] = {}
    for entry, offset in _entries(archive):
        name = _name(entry.name)
        if entry.kind is Kind.FILE:
            if offset + entry.size > end:
                msg = f"member {name!r} has {entry.size} bytes, the archive ends before"
                raise LayerFormatError(msg)
            files[name] = (offset, entry.size, os.pread(archive, _HEAD, offset).hex() if entry.size >= _HEAD else "")
        elif entry.kind in {Kind.HARDLINK, Kind.SYMLINK}:
            base = os.path.dirname(name) if entry.kind is Kind.SYMLINK else ""  # noqa: PTH120  text, no path
            links[name] = _name(os.path.normpath(os.path.join(base, entry.link)))  # noqa: PTH118  likewise
    return {"files": files, "links": links}


def digest(arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """The SHA-256 of `size` bytes of `fds[0]` from `offset` on."""
    offset, left = arguments["offset"], arguments["size"]
    hashed = hashlib.sha256()
    while left:
        chunk = os.pread(fds[0], min(_CHUNK, left), offset)
        if not chunk:
            raise LayerFormatError("the archive has become shorter")
        hashed.update(chunk)
        offset, left = offset + len(chunk), left - len(chunk)
    return {"digest": f"sha256:{hashed.hexdigest()}"}


def expand(arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Decompress `fds[0]` into `fds[1]`, at most `limit` bytes."""
    source, target = fds
    left = arguments["limit"]
    no_progress, bell = os.pipe()
    os.close(bell)
    stream = LayerStream(Growing(source, no_progress))
    while chunk := stream.read(_CHUNK):
        left -= len(chunk)
        if left < 0:
            msg = f"it has more than {arguments['limit']} bytes when it is decompressed"
            raise LayerFormatError(msg)
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(target, rest) :]
    return {}


def _entries(archive: int) -> Iterator[tuple[Entry, int]]:
    """Each member with the offset of its data."""
    reader = EntryReader()
    position = count = 0
    while not reader.finished:
        block = os.pread(archive, reader.wanted, position)
        if not block and reader.wanted == BLOCK:
            reader.receive_end()
            return
        if len(block) < reader.wanted:
            raise LayerFormatError("the archive ends within a header")
        position += len(block)
        entry = reader.receive(block)
        if entry is None:
            continue
        count += 1
        if count > MAX_MEMBERS:
            msg = f"the archive has more than {MAX_MEMBERS} members"
            raise LayerFormatError(msg)
        yield entry, position
        position += padded(entry.size)


def _name(text: str) -> str:
    if len(text) > _MAX_NAME:
        msg = f"member {text[:60]!r}… has a name of {len(text)} characters, at most {_MAX_NAME} are allowed"
        raise LayerFormatError(msg)
    return contained_path(text)
