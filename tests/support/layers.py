"""Unpacks layers with the real zygote and shows them as a container would see them: through overlayfs. Needs root."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cri_shim.adapters.content import Arrival
from cri_shim.adapters.layers import Layers
from cri_shim.adapters.zygote import Zygote
from cri_shim.model.ids import Digest
from cri_shim.model.image import LayerRecord
from cri_shim.model.layout import Layout
from cri_shim.wire.oci_image import Descriptor, Layer, digest_of
from tests.support import images


class LayerStack:
    """A layer directory of its own, with a zygote."""

    def __init__(self, base: Path) -> None:
        self.layout = Layout(base / "root", base / "state")
        self.layout.root.mkdir()
        self.zygote = Zygote()
        self.layers = Layers(self.layout, self.zygote, privileged=True)

    async def unpack(self, *blobs: images.Blob) -> list[LayerRecord]:
        """One on top of the other, bottom first."""
        await self.layers.open(())
        records: list[LayerRecord] = []
        chain = ""
        for blob in blobs:
            chain = digest_of(f"{chain} {blob.diff_id}".encode()) if chain else blob.diff_id
            records.append(await self.add(blob, Digest(chain), records))
        return records

    async def add(self, blob: images.Blob, chain: Digest, below: Sequence[LayerRecord] = ()) -> LayerRecord:
        """Unpack and commit one layer."""
        file = self.layout.root / "blob"
        file.write_bytes(blob.data)
        descriptor = Descriptor(blob.digest, len(blob.data), blob.media_type)
        layer = Layer(descriptor, Digest(blob.diff_id), chain)
        arrival = Arrival()
        arrival.begin(file)
        arrival.complete()
        try:
            unpacked = await self.layers.unpack((arrival.file, arrival.progress), layer, f"layer {blob.digest}")
        finally:
            arrival.close()
        try:
            return await self.layers.commit(unpacked, below)
        except BaseException:
            await self.layers.discard(unpacked)
            raise

    def left(self) -> list[str]:
        """The names in the layer directory."""
        return sorted(os.listdir(self.layout.layers))

    @contextlib.contextmanager
    def merged(self, records: Sequence[LayerRecord]) -> Iterator[Path]:
        """The layers as overlayfs shows them, read-only."""
        target = self.layout.root / "merged"
        empty = self.layout.root / "empty"
        target.mkdir(exist_ok=True)
        empty.mkdir(exist_ok=True)
        lowers = [str(self.layers.path(record)) for record in reversed(records)]
        options = "lowerdir=" + ":".join([*lowers, str(empty)])
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(target)], check=True)
        try:
            yield target
        finally:
            subprocess.run(["umount", str(target)], check=True)


@dataclass(frozen=True, slots=True)
class Seen:
    """One name in a tree."""

    kind: str
    mode: int
    uid: int
    gid: int
    content: str


def snapshot(root: Path) -> dict[str, Seen]:
    """Every name below `root`."""
    found = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            found[os.path.relpath(path, root)] = _look(path)
    return found


def _look(path: str) -> Seen:
    status = os.lstat(path)
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
    content = ""
    if kind == "file":
        content = Path(path).read_text()
    elif kind == "symlink":
        content = os.readlink(path)
    elif kind == "device":
        content = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    mode = 0o777 if kind == "symlink" else stat.S_IMODE(status.st_mode)
    return Seen(kind, mode, status.st_uid, status.st_gid, content)
