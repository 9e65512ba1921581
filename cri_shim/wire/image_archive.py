"""The documents of an archive of images: OCI image layouts, and what `docker save` wrote before it knew them.

Pure: bytes and names in, values out, and the other way round. Not the tar around them (`cri_shim.zygote.archive`) and
not the images (`cri_shim.wire.oci_image`). Invariant: a name that comes out is one that a user could have written.

Sources: OCI image-spec (image-layout.md, annotations.md), docker's image/spec v1.2, the annotations of containerd.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from cri_shim.model.errors import InvalidArgument, PullError
from cri_shim.model.ids import Digest, digest_hex, parse_digest
from cri_shim.model.refs import familiar, parse_reference
from cri_shim.wire.oci_image import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest

T = TypeVar("T")

LAYOUT_FILE: Final = "oci-layout"
LAYOUT: Final = b'{"imageLayoutVersion": "1.0.0"}\n'
INDEX_FILE: Final = "index.json"
DOCKER_FILE: Final = "manifest.json"
REF_NAME: Final = "org.opencontainers.image.ref.name"
CONTAINERD_NAME: Final = "io.containerd.image.name"

_DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
_DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar"
_OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_OCI_LAYERS: Final = {
    _DOCKER_LAYER: "application/vnd.oci.image.layer.v1.tar",
    f"{_DOCKER_LAYER}.gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    f"{_DOCKER_LAYER}.zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}


class _Index(msgspec.Struct, frozen=True):
    manifests: tuple[Descriptor, ...]


class DockerImage(msgspec.Struct, frozen=True, rename="pascal"):
    """One entry of `manifest.json`: names of members, config and layers, and tags."""

    config: str
    layers: tuple[str, ...] = ()
    repo_tags: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tags in full."""
        return tuple(_full(tag) for tag in self.repo_tags or ())


class _Typed(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str = ""
    manifests: msgspec.Raw = msgspec.Raw()


class _DiffIds(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...] = ()


class _Config(msgspec.Struct, frozen=True):
    rootfs: _DiffIds = _DiffIds()


@dataclass(frozen=True, slots=True)
class LayoutImage:
    """One manifest or index of a layout, and the tags that it has there, in full."""

    descriptor: Descriptor
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """One image for `layout_index` and `docker_index`."""

    descriptor: Descriptor
    names: tuple[str, ...]
    config: Digest
    layers: tuple[Digest, ...] | None
    """None: docker has no words for it."""


def blob_name(digest: Digest) -> str:
    """Where a layout has a blob."""
    return f"blobs/sha256/{digest_hex(digest)}"


def parse_layout(body: bytes) -> tuple[LayoutImage, ...]:
    """`index.json`. The same content under several names is one image. PullError, InvalidArgument."""
    found: dict[str, LayoutImage] = {}
    for descriptor in _decode(body, _Index, INDEX_FILE).manifests:
        try:
            parse_digest(descriptor.digest, f"a digest in {INDEX_FILE}")
        except InvalidArgument as error:
            raise PullError(error.cause) from None
        known = found.get(descriptor.digest, LayoutImage(descriptor, ()))
        names = dict.fromkeys((*known.names, *_names(descriptor.annotations or {})))
        found[descriptor.digest] = LayoutImage(known.descriptor, tuple(names))
    return tuple(found.values())


def parse_docker(body: bytes) -> tuple[DockerImage, ...]:
    """`manifest.json`. PullError."""
    return _decode(body, tuple[DockerImage, ...], DOCKER_FILE)


def diff_ids(config: bytes) -> tuple[str, ...]:
    """The digests of the uncompressed layers that an image config lists. PullError."""
    return _decode(config, _Config, "image config").rootfs.diff_ids


def docker_manifest(config: tuple[Digest, int], layers: Sequence[tuple[Digest, int]]) -> bytes:
    """A manifest for an image that came without one; the blobs with their sizes."""
    body = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": {"mediaType": _DOCKER_CONFIG, "digest": config[0], "size": config[1]},
        "layers": [{"mediaType": _DOCKER_LAYER, "digest": digest, "size": size} for digest, size in layers],
    }
    return msgspec.json.encode(body)


def oci_manifest(manifest: Manifest) -> bytes:
    """A docker manifest in the OCI's words: the same config, the same layers.

    Tools of containers/image take nothing else from a layout.
    """
    body = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _described(manifest.config, _OCI_CONFIG),
        "layers": [_described(layer, _OCI_LAYERS.get(layer.media_type, layer.media_type)) for layer in manifest.layers],
    }
    return msgspec.json.encode(body)


def _described(descriptor: Descriptor, media_type: str) -> dict[str, object]:
    return {"mediaType": media_type, "digest": descriptor.digest, "size": descriptor.size}


def layout_index(images: Iterable[Kept]) -> bytes:
    """`index.json`: an entry for each name, under both annotations that are in use for names."""
    entries: list[dict[str, object]] = []
    for image in images:
        entry = _described(image.descriptor, image.descriptor.media_type)
        named = [{**entry, "annotations": {CONTAINERD_NAME: name, REF_NAME: name}} for name in image.names]
        entries.extend(named or [entry])
    return msgspec.json.encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})


def docker_index(images: Iterable[Kept]) -> bytes:
    """`manifest.json`, for `docker load` and its like."""
    return msgspec.json.encode(
        [
            {
                "Config": blob_name(image.config),
                "RepoTags": [familiar(name) for name in image.names],
                "Layers": [blob_name(layer) for layer in image.layers],
            }
            for image in images
            if image.layers is not None
        ]
    )


def media_type(document: bytes) -> str:
    """Of a manifest or an index; the OCI's do not have to say it."""
    probe = _decode(document, _Typed, "a manifest")
    return probe.media_type or (OCI_INDEX if probe.manifests else OCI_MANIFEST)


def member(name: str, data: bytes) -> bytes:
    """A file of a tar, as a whole."""
    return member_head(name, len(data)) + data + bytes(-len(data) % 512)


def member_head(name: str, size: int) -> bytes:
    """Its header; the same for the same name and size."""
    import tarfile  # noqa: PLC0415  0.7 MiB that only a save needs

    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def _names(annotations: Mapping[str, str]) -> Iterable[str]:
    """The annotation of containerd has the whole name. The OCI's may: a word alone is a tag of nobody knows what."""
    name = annotations.get(CONTAINERD_NAME, "")
    reference = annotations.get(REF_NAME, "")
    if not name and ("/" in reference or ":" in reference):
        name = reference
    return (_full(name),) if name else ()


def _full(name: str) -> str:
    """InvalidArgument for what is no reference; a digest is left out, since it is the content's, not a name's."""
    ref = parse_reference(name)
    return f"{ref.name}:{ref.tag or 'latest'}"


def _decode(body: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        msg = f"{what} is malformed: {error}"
        raise PullError(msg) from None
