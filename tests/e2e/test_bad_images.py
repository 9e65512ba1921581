"""Images and registries that are wrong or hostile, over the socket: each is refused by name and leaves nothing."""

from __future__ import annotations

import gzip
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.bad_requests import INVALID, UNMET, cases
from tests.support import images
from tests.support.cri import Cri, container_config, fault
from tests.support.daemon import Daemon
from tests.support.expect import eventually, refused
from tests.support.images import Blob, Entry, Image
from tests.support.loopback_registry import Fault, LoopbackRegistry
from tests.support.world import unchanged

pytestmark = pytest.mark.root

PULL = grpc.StatusCode.UNKNOWN
"""The kubelet shows the bare message of this code."""

GOOD = images.layer([images.directory("etc"), images.file("etc/motd", b"hello\n" * 1000)])


@pytest.fixture(scope="module")
def puller(shared_daemon: Daemon, busybox: str) -> Iterator[Cri]:
    """No image of this file may cost a stack trace, not even in the log."""
    with shared_daemon.client() as cri:
        cri.pull(busybox)  # and what is made by the first pull and the first containers, and kept
        for handler in ("runc", "crun"):
            pod = cri.run_pod(shared_daemon.pod_config(network=pb.NODE), handler)
            cri.create(pod, container_config(busybox))
        cri.remove_all_pods()
        eventually(lambda: not any("probe" in line for line in shared_daemon.traces().processes))
        yield cri
    assert "Traceback" not in shared_daemon.log.read_text()


@pytest.fixture
def cri(shared_daemon: Daemon, puller: Cri, busybox: str) -> Iterator[Cri]:
    """Pods and images that a test has made go with it."""
    with unchanged(shared_daemon):
        yield puller
        puller.remove_all_pods()
        for image in puller.images.ListImages(pb.ListImagesRequest()).images:
            if busybox not in image.repo_tags:
                puller.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=image.id)))


@pytest.fixture
def loopback() -> Iterator[LoopbackRegistry]:
    with LoopbackRegistry() as running:
        yield running


REFERENCES = {
    "nothing": "",
    "white space": "a b",
    "upper case": "registry/UPPER",
    "no name": "registry.local/",
    "double slash": "a//b",
    "upwards": "../../etc/passwd",
    "bad tag": "a:b/c:",
    "two tags": "a:b:c",
    "short digest": "a@sha256:12",
    "another digest": f"a@md5:{'0' * 32}",
    "id as a name": "0" * 64,
    "long": "a" * 256,
    "very long": "a" * 100_000,
    "not ASCII": "caf\u00e9",
    "control character": "a\nb",
    "url": "https://a/b",
}


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=list(REFERENCES))
def test_references(cri: Cri, reference: str) -> None:
    spec = pb.ImageSpec(image=reference)
    with refused(INVALID, "image"):
        cri.images.PullImage(pb.PullImageRequest(image=spec))
    if reference in {"", "0" * 64}:
        return
    with refused(INVALID, "invalid image reference"):
        cri.images.ImageStatus(pb.ImageStatusRequest(image=spec))
    with refused(INVALID, "invalid image reference"):
        cri.images.RemoveImage(pb.RemoveImageRequest(image=spec))
    with refused(INVALID, "invalid image reference"):
        cri.images.ListImages(pb.ListImagesRequest(filter=pb.ImageFilter(image=spec)))


TRANSFERS = [
    ("blobs/", Fault.CORRUPT, "expected content with digest"),
    ("blobs/", Fault.TRUNCATE, "RegistryUnavailable"),
    ("blobs/", Fault.SHORT, "RegistryUnavailable"),
    ("blobs/", Fault.LONG, "more than the"),
    ("blobs/", Fault.NOT_FOUND, "not found"),
    ("blobs/", Fault.ERROR, "RegistryUnavailable"),
    ("blobs/", Fault.CLOSE, "RegistryUnavailable"),
    ("manifests/", Fault.NOT_FOUND, "not found"),
    ("manifests/", Fault.DENIED, "HTTP 401"),
    ("manifests/", Fault.FORBIDDEN, "HTTP 403"),
    ("manifests/", Fault.LIMITED, "RegistryUnavailable"),
    ("manifests/", Fault.ERROR, "RegistryUnavailable"),
    ("manifests/", Fault.CLOSE, "RegistryUnavailable"),
    ("manifests/", Fault.HTML, "manifest"),
    ("manifests/", Fault.CORRUPT, "digest"),
    ("manifests/", Fault.TRUNCATE, "RegistryUnavailable"),
]


@cases("part, what, words", [(f"{part}{what.name}", part, what, words) for part, what, words in TRANSFERS])
def test_transfers(cri: Cri, loopback: LoopbackRegistry, part: str, what: Fault, words: str) -> None:
    name = loopback.add("a/b:1", images.image([GOOD]))
    loopback.fail(part, what)
    with refused(PULL, words):
        cri.pull(name)
    loopback.heal()
    cri.pull(name)


def test_a_registry_that_is_gone(cri: Cri, tmp_path: Path) -> None:
    with images.registry(tmp_path) as registry:
        name = registry.push("a/b:1", images.image([GOOD]))
        cri.pull(name)
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            cri.pull(name)
        code, message = fault(caught.value)
        assert code is PULL
        assert message.startswith(f"RegistryUnavailable: registry {registry.address}: ")


def good(**config: object) -> Image:
    return images.image([GOOD], config)


def with_manifest(change: Callable[[dict[str, Any]], object], image: Image | None = None) -> Image:
    """An image whose manifest says something else."""
    image = image or good()
    document = json.loads(image.manifest.data)
    change(document)
    return replace(image, manifest=replace(image.manifest, data=json.dumps(document).encode()))


def with_config(data: bytes) -> Image:
    """An image with any bytes for a config."""
    image = good()
    config = replace(image.config, data=data)
    changed = with_manifest(lambda manifest: manifest.update(config=config.descriptor()), image)
    return replace(changed, blobs=(config, *image.blobs[1:]))


def with_layer(data: bytes, media_type: str = images.TAR_GZIP, diff_id: str = "") -> Image:
    """An image with any bytes for a layer."""
    return images.image([Blob(data, media_type, diff_id or images.digest(data))])


CONFIG = json.loads(good().config.data)
DOCUMENTS = [
    ("manifest that is no JSON", Image(Blob(b"{", images.MANIFEST), good().blobs), "manifest is malformed"),
    ("manifest that is a list", Image(Blob(b"[]", images.MANIFEST), good().blobs), "manifest is malformed"),
    ("manifest of another kind", Image(Blob(b"{}", "text/plain"), good().blobs), "manifest"),
    ("digest of another form", with_manifest(lambda m: m["layers"][0].update(digest="md5:12")), "md5:12"),
    ("digest with a path", with_manifest(lambda m: m["config"].update(digest="sha256:../../x")), "sha256:../../x"),
    ("negative size", with_manifest(lambda m: m["layers"][0].update(size=-1)), "-1"),
    ("another size", with_manifest(lambda m: m["layers"][0].update(size=7)), "expected 7 bytes"),
    ("huge config", with_manifest(lambda m: m["config"].update(size=1 << 40)), "config"),
    ("encrypted", with_manifest(lambda m: m["layers"][0].update(mediaType=f"{images.TAR}+encrypted")), "encrypted"),
    ("unknown layer", with_manifest(lambda m: m["layers"][0].update(mediaType="text/plain")), "text/plain"),
    ("too few layers", with_manifest(lambda m: m.update(layers=[])), "lists 1 layers, the manifest has 0"),
    ("too many layers", with_manifest(lambda m: m.update(layers=m["layers"] * 1000)), "1000 layers"),
    ("config that is no JSON", with_config(b"\xff"), "image config is malformed"),
    ("config with other types", with_config(b'{"config": {"Env": "x"}}'), "image config is malformed"),
    ("config without layers", with_config(b"{}"), "lists 0 layers"),
    ("another machine", images.image([GOOD], architecture="s390x"), "linux/s390x"),
    ("another system", images.image([GOOD], os="plan9"), "plan9"),
    ("NUL in the config", with_config(json.dumps({**CONFIG, "config": {"Cmd": ["a\0b"]}}).encode()), "NUL"),
    ("NUL in the user", with_config(json.dumps({**CONFIG, "config": {"User": "a\0b"}}).encode()), "NUL"),
    ("half a character", with_config(json.dumps({**CONFIG, "config": {"Env": ["A=\ud800"]}}).encode()), "config"),
    ("deep config", with_config(b'{"config": {"Volumes": {"/v": ' + b"[" * 100_000), "image config is malformed"),
]


@cases("image, words", DOCUMENTS)
def test_documents(cri: Cri, loopback: LoopbackRegistry, image: Image, words: str) -> None:
    with refused(PULL, words):
        cri.pull(loopback.add("a/b:1", image))


SQUASHED = gzip.compress(b"no archive")
BROKEN_LAYERS = [
    ("truncated", with_layer(GOOD.data[:-30]), "ends early"),
    ("damaged", with_layer(GOOD.data[:20] + b"\xff\xff\xff" + GOOD.data[23:]), "damaged"),
    ("no archive at all", with_layer(b"x" * 1000), "checksum"),
    ("no archive", with_layer(SQUASHED), "the archive ends within a header"),
    ("another diff ID", with_layer(GOOD.data, diff_id=images.digest(b"")), "expected content with diff ID"),
    ("followed by something", with_layer(GOOD.data + b"more"), "followed by something else"),
    ("upwards", images.image([images.layer([images.file("../x")])]), "'..'"),
    ("upwards in the middle", images.image([images.layer([images.file("a/../../x")])]), "'..'"),
    ("link upwards", images.image([images.layer([images.hardlink("x", "../../etc/passwd")])]), "'..'"),
    (
        "link outside",
        images.image([images.layer([images.hardlink("x", "/etc/passwd")])]),
        "'etc/passwd' is in no layer",
    ),
    (
        "link outside through a link",
        images.image([images.layer([images.symlink("e", "/etc"), images.hardlink("x", "e/passwd")])]),
        "'e/passwd' is in no layer",
    ),
    (
        "circle",
        images.image([images.layer([images.symlink("a", "b"), images.symlink("b", "a"), images.file("a/x")])]),
        "Too many levels",
    ),
    ("file as a directory", images.image([images.layer([images.file("f"), images.file("f/x")])]), "not a directory"),
    ("long name", images.image([images.layer([images.file("n" * 300)])]), "File name too long"),
    ("huge owner", images.image([images.layer([images.file("x", uid=1 << 40)])]), "uid"),
]


@cases("image, words", BROKEN_LAYERS)
def test_layers(cri: Cri, loopback: LoopbackRegistry, image: Image, words: str) -> None:
    with refused(PULL, words):
        cri.pull(loopback.add("a/b:1", image))


def test_what_leads_outside_stays_inside(
    cri: Cri, loopback: LoopbackRegistry, shared_daemon: Daemon, tmp_path: Path
) -> None:
    entries = [
        images.file("/absolute"),
        images.symlink("out", str(tmp_path)),
        images.file("out/through-a-link"),
        images.symlink("a", "/b"),
        images.symlink("b", "../../../../" + str(tmp_path)),
        images.file("a/through-a-chain"),
    ]
    name = loopback.add("a/b:1", images.image([images.layer(entries)]))
    cri.pull(name)
    assert not list(tmp_path.iterdir())
    assert not Path("/absolute").exists()
    (inside,) = (shared_daemon.root / "layers").glob("*/absolute")
    assert sorted(os.listdir(f"{inside.parent}{tmp_path}")) == ["through-a-chain", "through-a-link"]


@pytest.mark.parametrize("handler", ["runc", "crun"])
def test_device_nodes_of_an_image_open_nothing(
    cri: Cri, shared_daemon: Daemon, loopback: LoopbackRegistry, handler: str
) -> None:
    """Neither in the container, where its devices cgroup forbids all but the usual ones, nor for users of the host."""
    nodes = [
        images.device("null", "c", 1, 3),
        images.device("mem", "c", 1, 1),
        images.device("kmsg", "c", 1, 11),
        images.device("disk", "b", 7, 0),
        images.device("fuse", "c", 10, 229),
        images.device("gone", "c", 0, 0),
    ]
    image = images.busybox_image()
    image = images.image([image_layer(image), images.layer(nodes)])
    name = loopback.add("a/b:1", image)
    cri.pull(name)
    pod = cri.run_pod(shared_daemon.pod_config(network=pb.NODE), handler)
    script = "for n in null mem kmsg disk fuse gone; do head -c 1 /$n >/dev/null 2>&1 && echo opened $n; done; echo end"
    container = cri.run(pod, container_config(name, "sh", "-c", script))
    cri.wait_exit(container)
    assert [line.text for line in cri.log(container)] == ["opened null", "end"]
    assert stat.S_IMODE(shared_daemon.root.stat().st_mode) == 0o700


def image_layer(image: Image) -> Blob:
    return image.blobs[1]


HOSTILE_FILES = [
    ("fifo", [images.fifo("etc/passwd")], "/etc/passwd"),
    ("device", [images.device("etc/passwd", "c", 1, 5)], "/etc/passwd"),
    ("directory", [images.directory("etc/group")], "/etc/group"),
    ("circle", [images.symlink("etc/passwd", "group"), images.symlink("etc/group", "passwd")], "/etc/passwd"),
    ("huge", [images.file("etc/passwd", b"x" * (2 << 20))], "/etc/passwd"),
]


@cases("entries, words", HOSTILE_FILES)
def test_files_that_are_read_before_anything_runs(
    cri: Cri, shared_daemon: Daemon, loopback: LoopbackRegistry, entries: list[Entry], words: str
) -> None:
    name = loopback.add("a/b:1", images.image([images.layer(entries)]))
    cri.pull(name)
    pod = cri.run_pod(shared_daemon.pod_config(network=pb.NODE), "crun")
    with refused(INVALID, words):
        cri.create(pod, container_config(name, "/x"))


IMAGE_SETTINGS = [
    ("no command", {}, INVALID, "no command specified"),
    ("stop signal", {"Cmd": ["x"], "StopSignal": "SIGFLY"}, INVALID, "stop signal 'SIGFLY'"),
    ("unknown user", {"Cmd": ["x"], "User": "nobody-here"}, INVALID, "'nobody-here'"),
    ("unknown group", {"Cmd": ["x"], "User": "0:nobody-here"}, INVALID, "'nobody-here'"),
    ("huge user", {"Cmd": ["x"], "User": "99999999999"}, INVALID, "99999999999"),
    ("long working directory", {"Cmd": ["x"], "WorkingDir": "/" + "w" * 300}, INVALID, "working_dir"),
    ("missing program", {"Cmd": ["/no/such"]}, UNMET, "/no/such"),
]


@cases("settings, code, words", IMAGE_SETTINGS)
def test_settings(
    cri: Cri,
    shared_daemon: Daemon,
    loopback: LoopbackRegistry,
    settings: dict[str, object],
    code: grpc.StatusCode,
    words: str,
) -> None:
    name = loopback.add("a/b:1", images.image([GOOD], settings))
    cri.pull(name)
    pod = cri.run_pod(shared_daemon.pod_config(network=pb.NODE), "crun")
    with refused(code, words):
        cri.run(pod, container_config(name))
