"""Archives of images: what is taken from them, in every form that is in use, and what is refused without a trace."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest

from cri_shim.adapters import image_archive
from cri_shim.adapters.image_archive import Archives
from cri_shim.flows.image_load import ImportImages, LoadImages
from cri_shim.model.errors import CriShimError, FailedPrecondition, InvalidArgument, NotFound, PullError
from cri_shim.model.ids import ImageId
from cri_shim.model.refs import find_images
from cri_shim.pb import admin_pb2 as pb
from tests.support import archives, images
from tests.support.archives import CONTAINERD_NAME, REF_NAME, Members
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.puller import Node

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="layers are unpacked by root")

BASE = images.layer([images.directory("etc"), images.file("etc/motd", b"hello\n")])
TOP = images.layer([images.file("etc/issue", b"top\n")])
LINUX = images.image([BASE, TOP], {"Cmd": ["/bin/sh"]})
SAVED = images.image([archives.plain(BASE), archives.plain(TOP)], {"Cmd": ["/bin/sh"]})
"""The same image as docker save has it."""
WASM = images.wasm_artifact(b"\0asm\x01\0\0\0")
OTHER = images.wasm_artifact(b"\0asm other")
NAME = "docker.io/library/app:1"


def loader(node: Node) -> LoadImages:
    return LoadImages(Archives(node.layout, node.zygote), node.pull_image, node.names, node.progress)


async def load(node: Node, path: Path, name: str = "", *, pin: bool = False) -> list[tuple[str, list[str]]]:
    """The id and the tags of each image."""
    request = pb.LoadImagesRequest(path=str(path), name=name, pin=pin)
    return [(loaded.id, list(loaded.tags)) async for loaded in loader(node)(request) if loaded.id]


async def tags_of(node: Node) -> dict[str, list[str]]:
    return {image.id: list(image.repo_tags) for image in await node.listed()}


@pytest.mark.parametrize(
    ("words", "tags"),
    [
        ({CONTAINERD_NAME: "app:1", REF_NAME: "1"}, [NAME]),
        ({REF_NAME: "docker.io/library/app:1"}, [NAME]),
        ({REF_NAME: f"app:1@{WASM.digest}"}, [NAME]),
        ({REF_NAME: "latest"}, []),
        ({}, []),
    ],
)
async def test_the_names_of_a_layout(node: Node, tmp_path: Path, words: Mapping[str, str], tags: list[str]) -> None:
    path = archives.write(tmp_path / "a.tar", archives.layout([(WASM, words)]))
    image_id = f"sha256:{WASM.id[7:]}"
    assert await load(node, path) == [(image_id, tags)]
    assert await tags_of(node) == {image_id: tags}
    assert node.debris() == []


@needs_root
@pytest.mark.parametrize("form", ["layout", "save", "save of compressed layers", "gzip", "zstd", "dots"])
async def test_every_form_gives_the_same_image_as_a_pull(node: Node, tmp_path: Path, form: str) -> None:
    saved = archives.docker_save([(SAVED, ("app:1", "app:2"))])
    forms: dict[str, Callable[[], bytes]] = {
        "layout": lambda: archives.tar(
            archives.layout([(LINUX, {REF_NAME: "app:1", CONTAINERD_NAME: "app:1"}), (LINUX, {REF_NAME: "x/app:2"})])
        ),
        "save": lambda: archives.tar(saved),
        "save of compressed layers": lambda: archives.tar(
            archives.docker_save([(LINUX, ("app:1", "app:2"))], suffix=".tar.gz")
        ),
        "gzip": lambda: gzip.compress(archives.tar(saved), 1),
        "zstd": lambda: images.zstd_compress(archives.tar(saved)),
        "dots": lambda: archives.tar({f"./{name}": data for name, data in saved.items()}),
    }
    path = tmp_path / "a.tar"
    path.write_bytes(forms[form]())
    second = "docker.io/x/app:2" if form == "layout" else "docker.io/library/app:2"
    assert await load(node, path) == [(LINUX.id, [NAME, second])]
    record = node.store.images.values()[0]
    layers = [node.store.layers.get(key) for key in record.layers]
    files = [node.layout.layer(layer.number) for layer in layers if layer is not None]
    assert [(files[0] / "etc/motd").read_text(), (files[1] / "etc/issue").read_text()] == ["hello\n", "top\n"]
    assert node.debris() == []
    with LoopbackRegistry() as registry:
        assert await node.pull(registry.add("demo/app:1", LINUX)) == LINUX.id
    assert len(node.store.layers.values()) == 2
    assert node.debris() == []


@needs_root
async def test_layers_may_be_links(node: Node, tmp_path: Path) -> None:
    saved = archives.docker_save([(SAVED, ("app:1",))])
    name = next(name for name in saved if name.endswith("0/layer.tar"))
    layer = saved.pop(name)
    path = tmp_path / "a.tar"
    path.write_bytes(archives.tar({**saved, "real/layer.tar": layer}, links={name: "../real/layer.tar"}))
    assert await load(node, path) == [(LINUX.id, [NAME])]


async def test_both_kinds_of_an_index_are_taken(node: Node, tmp_path: Path) -> None:
    """As far as they are there, whichever that is."""
    both = images.index({f"linux/{images.ARCHITECTURE}": LINUX, "wasi/wasm": WASM})
    members = archives.layout([(both, {CONTAINERD_NAME: NAME})])
    path = archives.write(tmp_path / "a.tar", members)
    if os.geteuid() == 0:
        assert await load(node, path) == [(LINUX.id, [NAME]), (WASM.id, [NAME])]
        assert [image.is_wasm for image in find_images(node.store.images.values(), NAME)] == [False, True]
        await node.remove(NAME)
    for blob in (LINUX.manifest, *LINUX.blobs):
        del members[archives.blob_name(blob.digest)]
    path = archives.write(tmp_path / "b.tar", members)
    assert await load(node, path) == [(WASM.id, [NAME])]


async def test_an_index_may_lack_what_this_node_does_not_run(node: Node, tmp_path: Path) -> None:
    far = images.image([BASE], architecture="s390x")
    both = images.index({"linux/s390x": far, "wasi/wasm": WASM})
    members = archives.layout([(both, {CONTAINERD_NAME: NAME})])
    for blob in (far.manifest, *far.blobs):
        del members[archives.blob_name(blob.digest)]
    path = archives.write(tmp_path / "a.tar", members)
    assert await load(node, path) == [(WASM.id, [NAME])]
    assert node.store.images.values()[0].index == both.digest


async def test_a_name_may_be_given(node: Node, tmp_path: Path) -> None:
    one = archives.write(tmp_path / "1.tar", archives.layout([(WASM, {REF_NAME: "latest"})]))
    assert await load(node, one, "mine") == [(WASM.id, ["docker.io/library/mine:latest"])]
    two = archives.write(tmp_path / "2.tar", archives.layout([(WASM, {}), (OTHER, {})]))
    with pytest.raises(InvalidArgument, match="has 2 images"):
        await load(node, two, "mine")
    for bad in (f"x@{WASM.digest}", "UPPER"):
        with pytest.raises(InvalidArgument):
            await load(node, one, bad)


async def test_what_is_loaded_may_be_pinned_and_takes_its_tags(node: Node, tmp_path: Path) -> None:
    await load(node, archives.write(tmp_path / "1.tar", archives.layout([(WASM, {CONTAINERD_NAME: NAME})])))
    path = archives.write(tmp_path / "2.tar", archives.layout([(OTHER, {CONTAINERD_NAME: NAME})]))
    await load(node, path, pin=True)
    assert await tags_of(node) == {WASM.id: [], OTHER.id: [NAME]}
    assert {image.id: image.pinned for image in await node.listed()} == {WASM.id: False, OTHER.id: True}


async def test_one_bad_image_does_not_stop_the_others(node: Node, tmp_path: Path) -> None:
    members = archives.layout([(WASM, {CONTAINERD_NAME: "bad:1"}), (OTHER, {CONTAINERD_NAME: NAME})])
    del members[archives.blob_name(WASM.blobs[1].digest)]
    with pytest.raises(PullError, match=r"does not have sha256:.*"):
        await load(node, archives.write(tmp_path / "a.tar", members))
    assert await tags_of(node) == {OTHER.id: [NAME]}
    assert node.debris() == []


def _without(name: str) -> Callable[[Members], Members]:
    return lambda members: {key: data for key, data in members.items() if key != name}


def _with(name: str, data: bytes) -> Callable[[Members], Members]:
    return lambda members: {**members, name: data}


LAYER = archives.blob_name(BASE.digest)
LYING = images.image([images.Blob(BASE.data, BASE.media_type, TOP.diff_id)])


@needs_root
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_without("index.json"), "neither index.json nor manifest.json"),
        (_with("index.json", b"{"), "index.json is malformed"),
        (_with("index.json", b'{"manifests": []}'), "has no images"),
        (_with("index.json", b'{"manifests": [{"digest": "sha256:../../x", "size": 1}]}'), "not of the form sha256"),
        (_with("index.json", b'{"manifests": [{"digest": "' + b"a" * 9 + b'", "size": 1}]}'), "not of the form sha256"),
        (_without(archives.blob_name(LINUX.digest)), "does not have sha256:"),
        (_without(archives.blob_name(LINUX.id)), "does not have sha256:"),
        (_without(LAYER), "does not have sha256:"),
        (_with(archives.blob_name(LINUX.digest), b"{}"), "not what its digest says"),
        (_with(LAYER, BASE.data[:-1]), r"expected \d+ bytes"),
        (_with(LAYER, BASE.data[:-1] + b"x"), "not what its digest says"),
        (_with("../evil", b"x"), r"'\.\.' in its path"),
        (_with("n" * 2000, b"x"), "a name of 2000 characters"),
    ],
)
async def test_a_hostile_layout_is_refused_and_leaves_nothing(
    node: Node, tmp_path: Path, spoil: Callable[[Members], Members], text: str
) -> None:
    members = spoil(archives.layout([(LINUX, {CONTAINERD_NAME: NAME})]))
    with pytest.raises(PullError, match=text):
        await load(node, archives.write(tmp_path / "a.tar", members))
    assert await node.listed() == []
    await node.settled()
    assert node.blobs() == set()


@needs_root
@pytest.mark.parametrize(
    ("members", "text"),
    [
        (archives.layout([(LYING, {})]), "expected content with diff ID"),
        (archives.docker_save([(images.image([archives.plain(BASE)]), ("UPPER",))]), "must be lower case"),
        (
            _with("manifest.json", json.dumps([{"Config": "/etc/passwd", "Layers": []}]).encode())({}),
            "does not have /etc/passwd",
        ),
        (archives.docker_save([(images.image([images.Blob(b"x" * 600, "", BASE.diff_id)]), ("a:1",))]), "digest says"),
    ],
    ids=["another diff ID", "a bad tag", "a path of the host", "another layer"],
)
async def test_a_hostile_image_is_refused_and_leaves_nothing(
    node: Node, tmp_path: Path, members: Members, text: str
) -> None:
    with pytest.raises(CriShimError, match=text):
        await load(node, archives.write(tmp_path / "a.tar", members))
    assert await node.listed() == []
    await node.settled()
    assert node.blobs() == set()


@pytest.mark.parametrize("cut", [1, 511, 700, 2000])
async def test_an_archive_that_ends_early(node: Node, tmp_path: Path, cut: int) -> None:
    path = archives.write(tmp_path / "a.tar", archives.layout([(WASM, {})]))
    os.truncate(path, cut)
    with pytest.raises(PullError):
        await load(node, path)
    assert (await node.listed(), node.debris()) == ([], [])


async def test_a_compressed_archive_has_a_limit(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_archive, "_AT_LEAST", 1 << 20)
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(bytes(8 << 20), 9))
    with pytest.raises(PullError, match="more than 1048576 bytes when it is decompressed"):
        await load(node, path)
    assert node.debris() == []


async def test_a_million_members_are_not_listed(node: Node, tmp_path: Path) -> None:
    path = archives.write(tmp_path / "a.tar", {f"{number}": b"" for number in range(20_001)})
    with pytest.raises(PullError, match="more than 20000 members"):
        await load(node, path)


async def test_what_is_no_archive_is_said_to_be_none(node: Node, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("hello\n" * 200)
    (tmp_path / "bz2").write_bytes(bz2.compress(b"x"))
    (tmp_path / "empty").touch()
    for name, kind, text in (
        ("gone", NotFound, "does not exist"),
        ("fifo", FailedPrecondition, "no regular file"),
        (".", FailedPrecondition, "no regular file"),
        ("text", PullError, "no archive that can be read"),
        ("bz2", PullError, "compressed with bzip2"),
        ("empty", PullError, "neither index.json nor manifest.json"),
    ):
        with pytest.raises(kind, match=text):
            await load(node, tmp_path / name)
    with pytest.raises(InvalidArgument, match="not absolute"):
        await load(node, Path("a.tar"))


async def test_a_directory_is_imported_at_the_start(node: Node, tmp_path: Path) -> None:
    place = tmp_path / "import"
    place.mkdir()
    archives.write(place / "1.tar", archives.layout([(WASM, {CONTAINERD_NAME: NAME})]))
    archives.write(place / "3.tgz", archives.layout([(OTHER, {})]), compressed=True)
    (place / "2.tar").write_text("no archive")
    (place / "notes.txt").write_text("not looked at")
    for _ in range(2):  # a second start finds it all there
        importing = ImportImages(loader(node), place)
        importing.start()
        assert importing._task is not None
        await importing._task
        found = {image.id: (list(image.repo_tags), image.pinned) for image in await node.listed()}
        assert found == {WASM.id: ([NAME], True), OTHER.id: ([], True)}
        assert node.debris() == []


async def test_what_was_pulled_later_wins_over_what_lies_in_the_directory(node: Node, tmp_path: Path) -> None:
    place = tmp_path / "import"
    place.mkdir()
    archives.write(place / "1.tar", archives.layout([(WASM, {CONTAINERD_NAME: NAME})]))

    async def start_again() -> dict[str, list[str]]:
        importing = ImportImages(loader(node), place)
        importing.start()
        assert importing._task is not None
        await importing._task
        return await tags_of(node)

    assert await start_again() == {WASM.id: [NAME]}
    await load(node, archives.write(tmp_path / "2.tar", archives.layout([(OTHER, {CONTAINERD_NAME: NAME})])))
    later = (place / "1.tar").stat().st_ctime_ns + 1
    await node.store.images.update(ImageId(OTHER.id), lambda record: msgspec.structs.replace(record, pulled_at=later))
    assert await start_again() == {WASM.id: [], OTHER.id: [NAME]}
    await node.remove(NAME)
    assert await start_again() == {WASM.id: [NAME]}


async def test_a_directory_that_is_not_there_is_told_in_the_log(node: Node, tmp_path: Path) -> None:
    importing = ImportImages(loader(node), tmp_path / "gone")
    importing.start()
    assert importing._task is not None
    await importing._task
    await importing.aclose()
    assert await node.listed() == []
