"""The documents of an image: index, manifest and config, as OCI and docker write them, and what is chosen from them.

Pure: bytes in, values out. Not a model of everything the formats can say: only what a runtime needs is read. Invariant:
an `ImagePlan` has one diff ID for each layer to unpack, and only media types that this version can handle.

Sources: OCI image-spec (manifest.md, image-index.md, config.md), distribution "Image Manifest V 2, Schema 2", the CNCF
Wasm OCI artifact layout, runwasi's media types.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from cri_shim.model.errors import InvalidArgument, PullError
from cri_shim.model.ids import Digest, ImageId, parse_digest
from cri_shim.model.image import ImageConfig, Platform

T = TypeVar("T")

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_TYPES: Final = (OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST)

WASM_CONFIG: Final = "application/vnd.wasm.config.v0+json"
WASM_LAYERS: Final = frozenset(
    {
        "application/wasm",
        "application/vnd.wasm.content.layer.v1+wasm",
        "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
    }
)
_OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_UNKNOWN = "the media type is not known"
_TARS = frozenset(
    {
        *(_OCI_LAYER, f"{_OCI_LAYER}+gzip", f"{_OCI_LAYER}+zstd"),
        *(_DOCKER_LAYER, f"{_DOCKER_LAYER}.gzip", f"{_DOCKER_LAYER}.zstd"),
    }
)
"""Which of them it is, the content says."""
_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1"
_EMPTY_CONFIG = "application/vnd.oci.empty.v1+json"

MAX_LAYERS: Final = 500  # overlayfs: OVL_MAX_STACK


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """OCI image-spec, descriptor.md."""

    digest: str
    size: int
    media_type: str = ""
    annotations: dict[str, str] | None = None
    urls: tuple[str, ...] | None = None
    platform: _PlatformText | None = None

    @property
    def id(self) -> Digest:
        return Digest(self.digest)


class _PlatformText(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""
    variant: str | None = None

    def parsed(self) -> Platform:
        return Platform(self.os, self.architecture, self.variant or "")


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """An image index or docker manifest list."""

    manifests: tuple[Descriptor, ...]
    annotations: dict[str, str] | None = None


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """An image manifest of OCI or docker schema 2."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None


class _RunConfig(msgspec.Struct, frozen=True, rename="pascal"):
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    env: tuple[str, ...] | None = None
    working_dir: str | None = None
    user: str | None = None
    volumes: dict[str, object] | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None
    exposed_ports: dict[str, object] | None = None


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...] | None = None


class _Config(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""
    variant: str | None = None
    config: _RunConfig | None = None
    rootfs: _RootFs | None = None


class _Probe(msgspec.Struct, frozen=True, rename="camel"):
    """The fields that tell one document from another, where the media type does not."""

    schema_version: int = 0
    media_type: str = ""
    manifests: msgspec.Raw = msgspec.Raw()
    layers: msgspec.Raw = msgspec.Raw()
    fs_layers: msgspec.Raw = msgspec.Raw()


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer to unpack. The chain ID names it together with everything below it (config.md, "Layer ChainID")."""

    descriptor: Descriptor
    diff_id: Digest
    chain_id: Digest


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What one manifest and its config come to."""

    id: ImageId
    platform: Platform
    config: ImageConfig
    annotations: dict[str, str]
    layers: tuple[Layer, ...]
    wasm: Descriptor | None
    size: int
    """Bytes of all layers and the config, as transferred."""


def digest_of(data: bytes) -> Digest:
    """The content's own name."""
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


def parse_document(body: bytes, media_type: str) -> Index | Manifest:
    """An index or a manifest, by its media type, else by what is in it.

    PullError for schema 1 and for what is neither.
    """
    probe = _decode(body, _Probe, "manifest")
    kind = probe.media_type or media_type.partition(";")[0].strip()
    if kind.startswith(_SCHEMA1) or probe.schema_version == 1 or probe.fs_layers:
        hint = "push it again with a docker or buildah of this decade"
        raise PullError("the image has a docker schema 1 manifest, which is not supported", hint=hint)
    if kind in {OCI_INDEX, DOCKER_INDEX} or (probe.manifests and not probe.layers):
        return _checked_index(_decode(body, Index, "image index"))
    if not probe.layers:
        msg = f"what the registry returned as a manifest is none (media type {kind or 'unknown'})"
        raise PullError(msg)
    return _checked_manifest(_decode(body, Manifest, "image manifest"))


def host_platforms(machine: str) -> tuple[Platform, ...]:
    """The Linux platforms that a machine (uname -m) runs, best first."""
    known = {
        "x86_64": (("amd64", ""), ("amd64", "v1")),
        "aarch64": (("arm64", "v8"), ("arm64", "")),
        "armv7l": (("arm", "v7"), ("arm", ""), ("arm", "v6"), ("arm", "v5")),
        "armv6l": (("arm", "v6"), ("arm", ""), ("arm", "v5")),
        "i686": (("386", ""),),
        "riscv64": (("riscv64", ""),),
        "ppc64le": (("ppc64le", ""),),
        "s390x": (("s390x", ""),),
    }
    return tuple(Platform("linux", *names) for names in known.get(machine, ((machine, ""),)))


def choose(index: Index, host: Sequence[Platform], *, wants_wasm: bool | None) -> Descriptor:
    """The manifest of the index that fits; `wants_wasm` says which kind goes first (None: Linux), the other follows.

    PullError that lists the platforms there are, when none of them fits.
    """
    candidates = [entry for entry in index.manifests if _is_image(entry)]
    linux = [entry for platform in host for entry in candidates if platform_of(entry) == platform]
    wasm = [entry for entry in candidates if platform_of(entry).is_wasm]
    unnamed = [entry for entry in candidates if entry.platform is None]
    ordered = (wasm + linux if wants_wasm else linux + wasm) + unnamed
    if not ordered:
        there = ", ".join(sorted({platform_of(entry).text for entry in candidates})) or "none"
        wanted = host[0].text if host else "linux"
        msg = f"the image has no manifest for {wanted} or wasi/wasm, only for: {there}"
        raise PullError(msg)
    return ordered[0]


def plan_image(manifest: Manifest, digest: Digest, config: bytes, index_entry: Descriptor | None) -> ImagePlan:
    """What to fetch and to unpack, and what the image is.

    PullError for layers of unsupported kinds and for a config that does not fit the manifest.
    """
    parsed = _decode(config, _Config, "image config")
    modules = [layer for layer in manifest.layers if layer.media_type in WASM_LAYERS]
    # Beside a module there may be what its own host reads (a configuration, a policy): runwasi leaves it aside too.
    aside = [layer for layer in manifest.layers if modules and _why_refused(layer.media_type) == _UNKNOWN]
    tars = [layer for layer in manifest.layers if layer not in modules and layer not in aside]
    if len(modules) > 1:
        msg = f"the image has {len(modules)} Wasm layers, a container runs exactly one"
        raise PullError(msg)
    entry = index_entry.annotations if index_entry is not None else None
    return ImagePlan(
        id=_image_id(digest, manifest, config, modules),
        platform=_image_platform(parsed, index_entry, is_wasm=bool(modules)),
        config=_image_config(parsed.config or _RunConfig()),
        annotations={**(entry or {}), **(manifest.annotations or {})},
        layers=_with_chain_ids(tars, _diff_ids(parsed, manifest, tars)),
        wasm=modules[0] if modules else None,
        size=manifest.config.size + sum(layer.size for layer in (*tars, *modules)),
    )


def check_platform(plan: ImagePlan, host: Sequence[Platform]) -> None:
    """PullError for an image that was built for another machine; one that does not say is taken."""
    platform = plan.platform
    if platform.is_wasm or plan.wasm is not None or not platform.os:
        return
    if not any(platform.os == ours.os and platform.architecture == ours.architecture for ours in host):
        msg = f"the image is for {platform.text}, this node runs {host[0].text} and wasi/wasm"
        raise PullError(msg)


def _decode(body: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        msg = f"the {what} is malformed: {error}"
        raise PullError(msg) from None


def _checked_index(index: Index) -> Index:
    for entry in index.manifests:
        _check_descriptor(entry)
    return index


def _checked_manifest(manifest: Manifest) -> Manifest:
    for descriptor in (manifest.config, *manifest.layers):
        _check_descriptor(descriptor)
    if len(manifest.layers) > MAX_LAYERS:
        msg = f"the image has {len(manifest.layers)} layers, overlayfs takes {MAX_LAYERS}"
        raise PullError(msg)
    return manifest


def _check_descriptor(descriptor: Descriptor) -> None:
    try:
        parse_digest(descriptor.digest, "a digest in the manifest")
    except InvalidArgument as error:
        raise PullError(error.cause) from None
    if descriptor.size < 0:
        msg = f"the manifest gives {descriptor.digest} a size of {descriptor.size} bytes"
        raise PullError(msg)


def _is_image(entry: Descriptor) -> bool:
    """False for attestations and signatures that buildkit puts beside the images, as unknown/unknown."""
    return entry.media_type in {"", OCI_MANIFEST, DOCKER_MANIFEST} and platform_of(entry) != Platform(
        "unknown", "unknown"
    )


def platform_of(entry: Descriptor) -> Platform:
    """What an index says of one of its manifests; empty where it says nothing."""
    return entry.platform.parsed() if entry.platform is not None else Platform("", "")


def _image_id(digest: Digest, manifest: Manifest, config: bytes, modules: Sequence[Descriptor]) -> ImageId:
    """The config's digest, where the config determines the content.

    An artifact's config may be empty, or say nothing of the module, so that many artifacts share it: then the
    manifest's digest is what tells them apart.
    """
    if manifest.config.media_type == _EMPTY_CONFIG:
        return ImageId(digest)
    if any(module.digest.encode() not in config for module in modules):
        return ImageId(digest)
    return ImageId(manifest.config.digest)


def _image_platform(config: _Config, index_entry: Descriptor | None, *, is_wasm: bool) -> Platform:
    if index_entry is not None and index_entry.platform is not None:
        return index_entry.platform.parsed()
    if is_wasm and not config.os:
        return Platform("wasi", "wasm")
    return Platform(config.os, config.architecture, config.variant or "")


def _image_config(run: _RunConfig) -> ImageConfig:
    _refuse_nul(run)
    return ImageConfig(
        entrypoint=run.entrypoint or (),
        cmd=run.cmd or (),
        env=run.env or (),
        working_dir=run.working_dir or "",
        user=run.user or "",
        volumes=tuple(run.volumes or ()),
        stop_signal=run.stop_signal or "",
        labels=run.labels or {},
        exposed_ports=tuple(run.exposed_ports or ()),
    )


def _refuse_nul(run: _RunConfig) -> None:
    """These become arguments, variables, paths and names, for all of which a NUL is the end."""
    for field in ("entrypoint", "cmd", "env", "working_dir", "user", "volumes", "stop_signal"):
        value = getattr(run, field) or ()
        for text in [value] if isinstance(value, str) else value:
            if "\0" in text:
                msg = f"the image config has a NUL character in {field}: {text[:100]!r}"
                raise PullError(msg)


def _diff_ids(config: _Config, manifest: Manifest, tars: Sequence[Descriptor]) -> list[Digest]:
    """One for each tar layer; builders of Wasm images list the module's digest too, or do not."""
    listed = (config.rootfs.diff_ids if config.rootfs is not None else None) or ()
    if len(listed) == len(manifest.layers):
        pairs = zip(manifest.layers, listed, strict=True)
        listed = tuple(diff_id for layer, diff_id in pairs if layer in tars)
    if len(listed) != len(tars):
        msg = f"the image config lists {len(listed)} layers, the manifest has {len(tars)}"
        raise PullError(msg)
    try:
        return [parse_digest(diff_id, "a diff ID in the image config") for diff_id in listed]
    except InvalidArgument as error:
        raise PullError(error.cause) from None


def _with_chain_ids(tars: Sequence[Descriptor], diff_ids: Sequence[Digest]) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    for descriptor, diff_id in zip(tars, diff_ids, strict=True):
        chain_id = digest_of(f"{layers[-1].chain_id} {diff_id}".encode()) if layers else diff_id
        _check_media_type(descriptor)
        layers.append(Layer(descriptor, diff_id, chain_id))
    return tuple(layers)


def _check_media_type(layer: Descriptor) -> None:
    if reason := _why_refused(layer.media_type):
        msg = f"layer {layer.digest} of type {layer.media_type or 'unknown'} cannot be unpacked: {reason}"
        raise PullError(msg)


def _why_refused(media_type: str) -> str:
    """Empty for a layer that can be unpacked, or is a module."""
    if media_type in _TARS or media_type in WASM_LAYERS:
        return ""
    reasons = {
        "+encrypted": "it is encrypted",
        "foreign": "foreign layers are not in the registry",
        "nondistributable": "foreign layers are not in the registry",
    }
    return next((text for word, text in reasons.items() if word in media_type), _UNKNOWN)
