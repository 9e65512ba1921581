"""Archives of images: files of OCI image layouts and of `docker save`, opened and read as a registry is.

What is in them is decided by `cri_shim.wire.image_archive`; where, by a task in a process of its own, since nobody
vouches for the file. Invariant: nothing of an archive is taken without its digest, or without the diff ID that its
config gives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import tempfile
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from cri_shim.adapters.content import Ingest, WrongContentError
from cri_shim.adapters.full_disk import disk_errors
from cri_shim.adapters.registry import MAX_MANIFEST, Document
from cri_shim.adapters.shielded import to_the_end
from cri_shim.adapters.zygote import TaskError, Zygote
from cri_shim.model.errors import FailedPrecondition, InvalidArgument, NotFound, PullError
from cri_shim.model.ids import Digest, parse_digest
from cri_shim.model.layout import Layout
from cri_shim.wire import image_archive as wire
from cri_shim.wire.oci_image import DOCKER_MANIFEST, digest_of

_TASK_SECONDS: Final = 1800.0
_CHUNK: Final = 1 << 20
_LINKS: Final = 16
_MAX_CONFIG: Final = 8 << 20
_COMPRESSED: Final = ("1f8b", "28b52ffd")
_OTHER_COMPRESSED: Final = {b"\xfd7zXZ\0": "xz", b"BZh": "bzip2"}
_RATIO: Final = 100
_AT_LEAST: Final = 1 << 30
"""What a compressed archive may come to: so many times its size, or so many bytes."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A file in the archive: where its bytes are, and the first of them in hex."""

    offset: int
    size: int
    head: str

    @property
    def is_compressed(self) -> bool:
        return self.head.startswith(_COMPRESSED)


class _Contents(msgspec.Struct, frozen=True):
    """What the task `index` returns (`cri_shim.zygote.archive`)."""

    files: dict[str, Member]
    links: dict[str, str]


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """One image of an archive: its tags in full, and where it comes from."""

    names: tuple[str, ...]
    origin: ArchiveOrigin


class Archives:
    """Opens archives; `layout` has the room for those that have to be decompressed first."""

    def __init__(self, layout: Layout, zygote: Zygote) -> None:
        self._layout = layout
        self._zygote = zygote

    @contextlib.asynccontextmanager
    async def open(self, path: Path) -> AsyncGenerator[Archive]:
        """NotFound, FailedPrecondition for what is no file, PullError for what is no archive, ResourceExhausted."""
        with contextlib.ExitStack() as stack:
            fd = await asyncio.to_thread(_open, path)
            stack.callback(os.close, fd)
            head = await asyncio.to_thread(os.pread, fd, 8, 0)
            if head.hex().startswith(_COMPRESSED):
                fd = await self._expanded(fd, path, stack)
            for magic, name in _OTHER_COMPRESSED.items():
                if head.startswith(magic):
                    msg = f"{path} is compressed with {name}, which is not supported"
                    raise PullError(msg, hint="decompress it first")
            archive = Archive(path, fd, self._zygote)
            archive.contents = msgspec.convert(await archive.run("index", {}), _Contents)
            yield archive

    async def _expanded(self, fd: int, path: Path, stack: contextlib.ExitStack) -> int:
        """What is in a compressed archive, in a file without a name: a member of it can be anywhere."""
        with disk_errors(self._layout.root):
            room = stack.enter_context(await asyncio.to_thread(tempfile.TemporaryFile, dir=self._layout.partials))
            limit = max(_AT_LEAST, os.fstat(fd).st_size * _RATIO)
            await Archive(path, fd, self._zygote).run("expand", {"limit": limit}, room.fileno())
        return room.fileno()


@dataclass(slots=True)
class Archive:
    """An open archive, as long as the block of `Archives.open` lasts."""

    path: Path
    fd: int
    zygote: Zygote
    contents: _Contents = field(default_factory=lambda: _Contents({}, {}))

    async def images(self) -> tuple[ArchivedImage, ...]:
        """All of them. An archive that is both is read as a layout, which has the manifests."""
        files = self.contents.files
        if wire.INDEX_FILE in files and wire.LAYOUT_FILE in files:
            found = wire.parse_layout(await self.read(wire.INDEX_FILE, MAX_MANIFEST))
            blobs = {digest: member for name, member in files.items() if (digest := _blob_digest(name)) is not None}
            images = [
                ArchivedImage(image.names, ArchiveOrigin(self, image.descriptor.id, image.descriptor.media_type, blobs))
                for image in found
            ]
        elif wire.DOCKER_FILE in files:
            listed = wire.parse_docker(await self.read(wire.DOCKER_FILE, MAX_MANIFEST))
            images = [ArchivedImage(image.names, await self._docker_origin(image)) for image in listed]
        else:
            msg = f"{self.path} is no archive of images: it has neither {wire.INDEX_FILE} nor {wire.DOCKER_FILE}"
            raise PullError(msg)
        if not images:
            msg = f"{self.path} has no images"
            raise PullError(msg)
        return tuple(images)

    def member(self, name: str) -> Member:
        """A file, through links. PullError when there is none."""
        seen = name
        for _ in range(_LINKS):
            found = self.contents.files.get(name)
            if found is not None:
                return found
            name = self.contents.links.get(name, "")
        msg = f"{self.path} does not have {seen}"
        raise PullError(msg)

    async def read(self, name: str, limit: int) -> bytes:
        """A small file as a whole."""
        return await self.read_member(self.member(name), name, limit)

    async def read_member(self, member: Member, name: str, limit: int) -> bytes:
        if member.size > limit:
            msg = f"{name} in {self.path} has {member.size} bytes, at most {limit} are allowed"
            raise PullError(msg)
        return await asyncio.to_thread(os.pread, self.fd, member.size, member.offset)

    async def run(self, task: str, arguments: Mapping[str, Any], *fds: int) -> dict[str, Any]:
        """A task over the file. PullError for what is wrong with it."""
        try:
            return await self.zygote.run(
                f"cri_shim.zygote.archive:{task}", arguments, (self.fd, *fds), timeout=_TASK_SECONDS
            )
        except TaskError as error:
            if error.errno is not None:
                raise OSError(error.errno, error.text) from error
            if error.type in {"LayerFormatError", "StreamError"}:
                msg = f"{self.path} is no archive that can be read: {error.text}"
                raise PullError(msg) from error
            raise

    async def _docker_origin(self, image: wire.DockerImage) -> ArchiveOrigin:
        """With a manifest made from its parts: the config's own digest, and those of the layers."""
        config = await self.read(image.config, _MAX_CONFIG)
        diff_ids = wire.diff_ids(config)
        if len(diff_ids) != len(image.layers):
            msg = f"{image.config} in {self.path} lists {len(diff_ids)} layers, {wire.DOCKER_FILE} {len(image.layers)}"
            raise PullError(msg)
        members = [self.member(name) for name in image.layers]
        digests = [await self._digest(*pair) for pair in zip(members, diff_ids, strict=True)]
        sizes = [member.size for member in members]
        body = wire.docker_manifest((digest_of(config), len(config)), list(zip(digests, sizes, strict=True)))
        manifest = Document(body, DOCKER_MANIFEST, digest_of(body))
        blobs = {digest_of(config): self.member(image.config), **dict(zip(digests, members, strict=True))}
        return ArchiveOrigin(self, manifest.digest, DOCKER_MANIFEST, blobs, manifest)

    async def _digest(self, member: Member, diff_id: str) -> Digest:
        """A layer that is not compressed has its diff ID as digest, which is verified when it is taken in."""
        if member.is_compressed:
            arguments = {"offset": member.offset, "size": member.size}
            return Digest((await self.run("digest", arguments))["digest"])
        try:
            return parse_digest(diff_id, "a diff ID in the image config")
        except InvalidArgument as error:
            raise PullError(error.cause) from None


@dataclass(frozen=True, slots=True)
class ArchiveOrigin:
    """`cri_shim.adapters.origin.Origin` for one image of an archive."""

    archive: Archive
    digest: Digest
    media_type: str
    blobs: Mapping[Digest, Member]
    made: Document | None = None
    """The manifest of an image that has none in the archive."""

    async def resolve(self) -> Document:
        """The manifest or index of the image."""
        if self.made is not None:
            return self.made
        return await self._document(self.digest, self.media_type)

    def has(self, digest: Digest) -> bool:
        """Archives often have one platform of an index, and leave out the others."""
        return digest in self.blobs

    async def manifest(self, digest: Digest) -> Document:
        """A manifest that an index names."""
        return await self._document(digest, "")

    async def blob(self, ingest: Ingest) -> None:
        """Complete and verify a blob."""
        member = self._member(ingest.digest)
        if member.size != ingest.size:
            msg = f"{ingest.what}: expected {ingest.size} bytes, {self.archive.path} has {member.size}"
            raise PullError(msg)
        try:
            while ingest.received < member.size:
                # Also when cancelled: a thread must not read from what is closed.
                await to_the_end(asyncio.to_thread(_copy_piece, self.archive.fd, member, ingest))
            await to_the_end(asyncio.to_thread(ingest.verify))
        except WrongContentError as error:
            msg = f"{ingest.what}: the content in {self.archive.path} is not what its digest says"
            raise PullError(msg) from error

    def worth_another(self, error: WrongContentError) -> bool:
        """A file says the same the next time."""
        del error
        return False

    async def _document(self, digest: Digest, media_type: str) -> Document:
        body = await self.archive.read_member(self._member(digest), digest, MAX_MANIFEST)
        if digest_of(body) != digest:
            msg = f"the content of {digest} in {self.archive.path} is not what its digest says"
            raise PullError(msg)
        return Document(body, media_type, digest)

    def _member(self, digest: Digest) -> Member:
        member = self.blobs.get(digest)
        if member is None:
            msg = f"{self.archive.path} does not have {digest}"
            raise PullError(msg, hint="it may have been saved on a machine of another kind")
        return member


def _copy_piece(fd: int, member: Member, ingest: Ingest) -> None:
    chunk = os.pread(fd, min(_CHUNK, member.size - ingest.received), member.offset + ingest.received)
    if not chunk:
        msg = f"{ingest.what}: the archive has become shorter"
        raise PullError(msg)
    ingest.write([chunk])


def _open(path: Path) -> int:
    """O_NONBLOCK: a FIFO is refused, not waited for."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        msg = f"{path} does not exist"
        raise NotFound(msg) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        msg = f"{path} is no regular file"
        raise FailedPrecondition(msg)
    return fd


def _blob_digest(name: str) -> Digest | None:
    prefix, _, text = name.rpartition("/")
    try:
        return parse_digest(f"sha256:{text}") if prefix == "blobs/sha256" else None
    except InvalidArgument:
        return None
