"""Records of images and of their unpacked layers: what the store keeps and what the flows read.

Not the documents of a registry (`cri_shim.wire.oci_image`). Invariant: an `ImageRecord` in the store is complete: its
config and manifest are on disk as verified blobs, and so are its layers, each as a `LayerRecord`, and its Wasm module.
"""

from __future__ import annotations

import msgspec

from cri_shim.model.ids import Digest, ImageId


class Platform(msgspec.Struct, frozen=True):
    """OCI image-spec, index: `os/architecture[/variant]`; empty strings where nothing is said."""

    os: str
    architecture: str
    variant: str = ""

    @property
    def is_wasm(self) -> bool:
        """True for wasi/wasm, wasip1/wasm, wasip2/wasm and the like."""
        return self.architecture.startswith("wasm") or self.os.startswith("wasi")

    @property
    def text(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part) or "unknown"


class ImageConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of the image config that decides how a container of the image runs (OCI image-spec, config)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""
    labels: dict[str, str] = {}
    exposed_ports: tuple[str, ...] = ()


class WasmModule(msgspec.Struct, frozen=True):
    """A module or component that came as a blob of its own; it stays in the blob directory."""

    digest: Digest
    media_type: str
    size: int


class ImageRecord(msgspec.Struct, frozen=True):
    """One image, under whatever names it has. `size` is what was transferred: layers and config, in bytes."""

    id: ImageId
    manifest: Digest
    index: Digest | None
    config_digest: Digest
    size: int
    platform: Platform
    config: ImageConfig
    pulled_at: int
    """Unix time, ns."""
    repo_tags: tuple[str, ...] = ()
    repo_digests: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    """What a user has pinned it by: tags of `repo_tags`, or its id."""
    annotations: dict[str, str] = {}
    """Of the index entry and the manifest; the manifest wins."""
    layers: tuple[Digest, ...] = ()
    """Keys of the LayerRecords, bottom first. Empty for a Wasm artifact."""
    wasm: WasmModule | None = None
    blobs: tuple[Digest, ...] = ()
    """Every blob that this record needs on disk: index, manifest, config, module, and layers where they are kept."""
    modules: tuple[Digest, ...] = ()
    """Wasm modules of the image that stay compiled as long as it is here: its own, or files of its layers."""

    @property
    def key(self) -> ImageId:
        return self.id

    @property
    def is_wasm(self) -> bool:
        return self.wasm is not None or self.platform.is_wasm

    def is_sibling(self, other: ImageRecord) -> bool:
        """True for another platform of the same index."""
        return self.id != other.id and self.index is not None and self.index == other.index


class LayerRecord(msgspec.Struct, frozen=True):
    """One unpacked layer, an overlayfs lower directory that images share.

    `key` is the diff ID. A layer that takes from the layers below it, or hides what they have, is right only on top of
    them, so its key is the chain ID (OCI image-spec, config, "Layer ChainID").
    """

    key: Digest
    diff_id: Digest
    number: int
    """The directory `layers/<number>`."""
    size: int
    """Bytes on disk."""
    inodes: int
    needs_parents: bool = False
    """It has directories or hardlinks of the layers below it, or hides what they have."""
    fingerprint: str = ""
    """Of the directory as it was unpacked (`cri_shim.zygote.fingerprint`); empty where an earlier version made it."""
    inherits_root: bool = False
    """The archive says nothing about the root directory: over lower layers with an unusual root it needs them."""


class UnfinishedPull(msgspec.Struct, frozen=True):
    """What a pull needs on disk until its image is complete; also one that failed, so that the next goes on from it."""

    manifest: Digest
    reference: str
    started_at: int
    """Unix time, ns."""
    blobs: tuple[Digest, ...]
    """Documents, module, and layers where they are kept."""
    layers: tuple[tuple[Digest, Digest, Digest], ...]
    """Of each layer to unpack: the blob, which has served when there is a record of its diff ID or its chain ID."""

    @property
    def key(self) -> Digest:
        return self.manifest
