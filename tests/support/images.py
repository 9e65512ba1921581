"""Builds images and pushes them to a registry, with the standard library alone.

    layer = images.layer([images.directory("etc"), images.file("etc/motd", b"hello\\n")])
    image = images.image([layer], config={"Cmd": ["/bin/sh"]})
    with images.registry(directory) as registry:
        name = registry.push("demo/hello:1", image)

Not an image tool: what it makes may be as odd as a test wants it. Invariant: the same arguments give the same bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from tests.support import wasm

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

OCI: Final = "application/vnd.oci.image"
DOCKER: Final = "application/vnd.docker"
INDEX: Final = f"{OCI}.index.v1+json"
MANIFEST: Final = f"{OCI}.manifest.v1+json"
CONFIG: Final = f"{OCI}.config.v1+json"
TAR: Final = f"{OCI}.layer.v1.tar"
TAR_GZIP: Final = f"{TAR}+gzip"
TAR_ZSTD: Final = f"{TAR}+zstd"
DOCKER_INDEX: Final = f"{DOCKER}.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = f"{DOCKER}.distribution.manifest.v2+json"
DOCKER_CONFIG: Final = f"{DOCKER}.container.image.v1+json"
DOCKER_TAR_GZIP: Final = f"{DOCKER}.image.rootfs.diff.tar.gzip"
WASM_CONFIG: Final = "application/vnd.wasm.config.v0+json"
WASM_LAYER: Final = "application/wasm"

ARCHITECTURE: Final = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
MTIME: Final = 1_700_000_000
_READY_SECONDS: Final = 20.0


class ImageError(Exception):
    """An image could not be built or pushed, or a registry did not start."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes with their media type."""

    data: bytes
    media_type: str
    diff_id: str = ""
    """Of a tar layer: the digest of the uncompressed archive."""

    @property
    def digest(self) -> str:
        return digest(self.data)

    def descriptor(self, **more: object) -> dict[str, object]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.data), **more}


@dataclass(frozen=True, slots=True)
class Image:
    """A manifest or index, and all that it refers to."""

    manifest: Blob
    blobs: tuple[Blob, ...]
    manifests: tuple[Blob, ...] = ()
    """Of an index: the manifests that it lists."""

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def config(self) -> Blob:
        return self.blobs[0]

    @property
    def id(self) -> str:
        """The digest of the config."""
        return self.config.digest


Entry = tuple[tarfile.TarInfo, bytes]


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def file(path: str, data: bytes = b"", mode: int = 0o644, **attributes: object) -> Entry:
    """`attributes` are those of TarInfo (uid, gid, mtime, pax_headers…)."""
    return _info(path, tarfile.REGTYPE, mode, size=len(data), **attributes), data


def directory(path: str, mode: int = 0o755, **attributes: object) -> Entry:
    return _info(path, tarfile.DIRTYPE, mode, **attributes), b""


def symlink(path: str, target: str, **attributes: object) -> Entry:
    return _info(path, tarfile.SYMTYPE, 0o777, linkname=target, **attributes), b""


def hardlink(path: str, target: str, **attributes: object) -> Entry:
    return _info(path, tarfile.LNKTYPE, 0o644, linkname=target, **attributes), b""


def fifo(path: str, mode: int = 0o644, **attributes: object) -> Entry:
    return _info(path, tarfile.FIFOTYPE, mode, **attributes), b""


def device(path: str, kind: str, major: int, minor: int, **attributes: object) -> Entry:
    """`kind` is c or b."""
    type_ = {"c": tarfile.CHRTYPE, "b": tarfile.BLKTYPE}[kind]
    return _info(path, type_, 0o666, devmajor=major, devminor=minor, **attributes), b""


def whiteout(path: str) -> Entry:
    """Hides `path` of lower layers."""
    parent, slash, name = path.rpartition("/")
    return file(f"{parent}{slash}.wh.{name}")


def opaque(path: str) -> Entry:
    """Hides what lower layers have in the directory `path`."""
    return file(f"{path}/.wh..wh..opq" if path else ".wh..wh..opq")


def tar(entries: Iterable[Entry], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """An uncompressed archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, errors="surrogateescape") as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def layer(entries: Iterable[Entry], media_type: str = TAR_GZIP) -> Blob:
    """A layer, compressed if its media type says so."""
    return layer_of(tar(entries), media_type)


def layer_of(archive: bytes, media_type: str = TAR_GZIP) -> Blob:
    """The same from an archive that the caller has made."""
    data = archive
    if media_type.endswith("gzip"):
        data = gzip.compress(archive, compresslevel=1, mtime=0)
    elif media_type.endswith("zstd"):
        data = zstd_compress(archive)
    return Blob(data, media_type, digest(archive))


def zstd_compress(data: bytes) -> bytes:
    """One frame."""
    return bytes(zstd.compress(data))


def image(
    layers: Sequence[Blob],
    config: Mapping[str, object] | None = None,
    *,
    os: str = "linux",
    architecture: str = ARCHITECTURE,
    annotations: Mapping[str, str] | None = None,
) -> Image:
    """An OCI image; `config` is what a container runs with (Cmd, Env…)."""
    body = _config(layers, config or {}, os, architecture)
    return _image(Blob(_json(body), CONFIG), layers, MANIFEST, annotations)


def docker_image(layers: Sequence[Blob], config: Mapping[str, object] | None = None) -> Image:
    """A docker schema 2 image; give its layers docker's media type."""
    body = _config(layers, config or {}, "linux", ARCHITECTURE)
    return _image(Blob(_json(body), DOCKER_CONFIG), layers, DOCKER_MANIFEST, None)


def index(images: Mapping[str, Image], media_type: str = INDEX) -> Image:
    """An index; the keys are platforms, `os/architecture[/variant]`."""
    entries = []
    for name, member in images.items():
        words = dict(zip(("os", "architecture", "variant"), name.split("/"), strict=False))
        entries.append(member.manifest.descriptor(platform=words))
    body = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}
    blobs = tuple(blob for member in images.values() for blob in member.blobs)
    return Image(Blob(_json(body), media_type), blobs, tuple(member.manifest for member in images.values()))


def wasm_artifact(
    module: bytes, *, layer_type: str = WASM_LAYER, annotations: Mapping[str, str] | None = None
) -> Image:
    """The CNCF layout: an artifact with a config that lists its layer."""
    blob = Blob(module, layer_type)
    config = {"created": "2024-01-01T00:00:00Z", "architecture": "wasm", "os": "wasip1", "layerDigests": [blob.digest]}
    return _image(Blob(_json(config), WASM_CONFIG), [blob], MANIFEST, annotations)


def wasm_image(module: bytes, config: Mapping[str, object] | None = None, *, layer_type: str = WASM_LAYER) -> Image:
    """An ordinary OCI config over a Wasm layer, as runwasi's tools write it: no diff IDs."""
    return image([Blob(module, layer_type)], config, os="wasi", architecture="wasm")


def busybox_image() -> Image:
    """Debian's busybox-static with a link for each of its applets."""
    program = shutil.which("busybox")
    if program is None:
        raise ImageError("busybox is missing: apt install busybox-static")
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    entries = [
        directory("./"),
        *(directory(name) for name in ("bin", "dev", "etc", "home", "proc", "root", "sys", "usr", "usr/bin", "var")),
        directory("tmp", 0o1777),
        file("bin/busybox", Path(program).read_bytes(), 0o755),
        *(symlink(f"bin/{name}", "busybox") for name in applets if name != "busybox"),
        symlink("usr/bin/env", "../../bin/busybox"),
        file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n"),
        file("etc/group", b"root:x:0:\nnogroup:x:65534:\n"),
    ]
    return image([layer(entries)], {"Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin"]})


def push(base: str, repository: str, tag: str, image: Image) -> str:
    """Push to a registry at `http://host:port`. Returns the digest of the manifest or index."""
    parts = urlsplit(base)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        for blob in {blob.digest: blob for blob in image.blobs}.values():
            _push_blob(connection, repository, blob)
        for manifest in image.manifests:
            _push_manifest(connection, repository, manifest.digest, manifest)
        _push_manifest(connection, repository, tag, image.manifest)
    finally:
        connection.close()
    return image.digest


@dataclass(slots=True)
class Registry:
    """A registry that runs as a process of its own."""

    address: str
    """`127.0.0.1:port`, which speaks plain HTTP."""
    kind: str
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def push(self, name: str, image: Image) -> str:
        """Push `image` as `repository:tag`; returns the reference to pull."""
        repository, _, tag = name.rpartition(":")
        push(self.url, repository, tag, image)
        return f"{self.address}/{name}"

    def push_busybox(self, name: str) -> str:
        """Push `busybox_image`; returns the reference to pull."""
        return self.push(name, busybox_image())

    def push_wasm(self, name: str, text: str = wasm.HELLO) -> str:
        """Push a guest, given as Wasm text, as an artifact; returns the reference to pull."""
        return self.push(name, wasm_artifact(wasm.assemble(text)))

    def mirror(self, directory: Path, *domains: str) -> None:
        """Write `hosts.toml` files below `directory` that send the domains here."""
        for domain in domains:
            place = directory / domain
            place.mkdir(parents=True, exist_ok=True)
            text = f'server = "{self.url}"\n[host."{self.url}"]\ncapabilities = ["pull", "resolve"]\n'
            (place / "hosts.toml").write_text(text)

    def close(self) -> None:
        """End the process."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def registry(directory: Path) -> Iterator[Registry]:
    """Debian's docker-registry on a free loopback port, its data below `directory`; else the loopback registry."""
    directory.mkdir(parents=True, exist_ok=True)
    started = _start_docker_registry(directory) if shutil.which("docker-registry") else _start_loopback(directory)
    try:
        _wait_until_ready(started)
        yield started
    finally:
        started.close()


def _start_docker_registry(directory: Path) -> Registry:
    port = _free_port()
    settings = directory / "registry.json"  # YAML includes JSON
    settings.write_text(
        json.dumps(
            {
                "version": "0.1",
                "log": {"level": "warn", "accesslog": {"disabled": True}},
                "storage": {"filesystem": {"rootdirectory": str(directory / "data")}, "delete": {"enabled": True}},
                "http": {"addr": f"127.0.0.1:{port}"},
                "validation": {"disabled": True},
            }
        )
    )
    return _start(("docker-registry", "serve", str(settings)), port, directory, "docker-registry")


def _start_loopback(directory: Path) -> Registry:
    port = _free_port()
    return _start((sys.executable, "-m", "tests.support.loopback_registry", str(port)), port, directory, "loopback")


def _start(argv: Sequence[str], port: int, directory: Path, kind: str) -> Registry:
    with (directory / "log").open("ab") as log:
        root = Path(__file__).parent.parent.parent
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=root)
    return Registry(f"127.0.0.1:{port}", kind, process)


def _wait_until_ready(registry: Registry) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while registry.process.poll() is None and time.monotonic() < deadline:
        connection = http.client.HTTPConnection(registry.address, timeout=5)
        try:
            connection.request("GET", "/v2/")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.02)
        finally:
            connection.close()
    msg = f"the {registry.kind} registry did not start on {registry.address}"
    raise ImageError(msg)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _info(path: str, type_: bytes, mode: int, **attributes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type, info.mode, info.mtime = type_, mode, MTIME
    for name, value in attributes.items():
        setattr(info, name, value)
    return info


def _config(layers: Sequence[Blob], run: Mapping[str, object], os: str, architecture: str) -> dict[str, object]:
    diff_ids = [blob.diff_id for blob in layers if blob.diff_id]
    return {
        "architecture": architecture,
        "os": os,
        "config": dict(run),
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }


def _image(config: Blob, layers: Sequence[Blob], media_type: str, annotations: Mapping[str, str] | None) -> Image:
    body: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": config.descriptor(),
        "layers": [blob.descriptor() for blob in layers],
    }
    if annotations:
        body["annotations"] = dict(annotations)
    return Image(Blob(_json(body), media_type), (config, *layers))


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _push_blob(connection: http.client.HTTPConnection, repository: str, blob: Blob) -> None:
    _request(connection, "HEAD", f"/v2/{repository}/blobs/{blob.digest}", {200, 404})
    place = _request(connection, "POST", f"/v2/{repository}/blobs/uploads/", {202})
    parts = urlsplit(place)
    query = f"{parts.query}&" if parts.query else ""
    headers = {"Content-Type": "application/octet-stream"}
    target = f"{parts.path}?{query}digest={blob.digest}"
    _request(connection, "PUT", target, {201}, blob.data, headers)


def _push_manifest(connection: http.client.HTTPConnection, repository: str, name: str, manifest: Blob) -> None:
    headers = {"Content-Type": manifest.media_type}
    _request(connection, "PUT", f"/v2/{repository}/manifests/{name}", {201}, manifest.data, headers)


def _request(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    wanted: set[int],
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> str:
    """Send, and return the Location of the answer."""
    connection.request(method, path, body, dict(headers or {}))
    response = connection.getresponse()
    text = response.read()
    if response.status not in wanted:
        msg = f"{method} {path}: HTTP {response.status}: {text[:300].decode(errors='replace')}"
        raise ImageError(msg)
    return response.headers.get("Location", "")
