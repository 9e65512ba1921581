"""Archives of images as docker, skopeo and others write them, and as nobody should: tars in any shape a test wants."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.support.images import Blob, Image

CONTAINERD_NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"

Members = dict[str, bytes]


def blob_name(digest: str) -> str:
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def layout(images: Iterable[tuple[Image, Mapping[str, str]]]) -> Members:
    """An OCI image layout; each image with the annotations of its entry."""
    members: Members = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
    entries = []
    for image, words in images:
        entries.append(image.manifest.descriptor(annotations=dict(words)))
        for blob in (image.manifest, *image.manifests, *image.blobs):
            members[blob_name(blob.digest)] = blob.data
    members["index.json"] = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    return members


def docker_save(images: Iterable[tuple[Image, tuple[str, ...]]], *, suffix: str = "/layer.tar") -> Members:
    """The form of docker before version 25: no manifests, layers that are not compressed, unless the image's are."""
    members: Members = {}
    entries = []
    for image, tags in images:
        config = f"{image.id.removeprefix('sha256:')}.json"
        members[config] = image.config.data
        layers = []
        for number, blob in enumerate(image.blobs[1:]):
            name = f"{image.id[7:20]}{number}{suffix}"
            members[name] = blob.data
            layers.append(name)
        entries.append({"Config": config, "RepoTags": list(tags) or None, "Layers": layers})
    members["manifest.json"] = json.dumps(entries).encode()
    return members


def tar(members: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    """The members in their order, then symbolic links."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return out.getvalue()


def write(path: Path, members: Mapping[str, bytes], *, compressed: bool = False) -> Path:
    data = tar(members)
    path.write_bytes(gzip.compress(data, 1) if compressed else data)
    return path


def plain(blob: Blob) -> Blob:
    """A gzip layer as docker save has it."""
    return Blob(gzip.decompress(blob.data), "application/vnd.docker.image.rootfs.diff.tar", blob.diff_id)
