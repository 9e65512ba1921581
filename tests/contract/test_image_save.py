"""Images as archives and as a directory, read by ourselves and by skopeo."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from cri_shim.adapters.image_archive import Archives
from cri_shim.flows.image_load import LoadImages
from cri_shim.flows.image_save import SaveImages
from cri_shim.model.errors import InvalidArgument, NotFound, PullError
from cri_shim.model.ids import Digest, ImageId
from cri_shim.pb import admin_pb2 as pb
from tests.support import archives, images
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.puller import Node

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="layers are unpacked by root")

BASE = images.layer([images.directory("etc"), images.file("etc/motd", b"hello\n" * 9000)])
PLAIN = images.layer([images.file("etc/issue", b"top\n")], "application/vnd.oci.image.layer.v1.tar")
LINUX = images.image([BASE, PLAIN], {"Cmd": ["/bin/sh"]})
DOCKER = images.docker_image(
    [images.Blob(BASE.data, "application/vnd.docker.image.rootfs.diff.tar.gzip", BASE.diff_id)]
)
WASM = images.wasm_artifact(b"\0asm\x01\0\0\0")
FAR = images.image([BASE], architecture="s390x")
MANY = images.index({f"linux/{images.ARCHITECTURE}": LINUX, "linux/s390x": FAR})


async def save(node: Node, *names: str) -> bytes:
    saving = SaveImages(node.store.images, node.content, node.registry, node.collector, node.puller, node.image_layout)
    return b"".join([piece.data async for piece in saving(pb.SaveImagesRequest(images=names))])


async def run(*words: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


def members(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getnames()


def copied(directory: Path) -> tuple[bytes, set[str]]:
    """The manifest and the names of the blobs that skopeo has put there."""
    return (directory / "manifest.json").read_bytes(), {file.name for file in directory.iterdir()}


@needs_root
async def test_a_saved_image_comes_back_as_it_was(node: Node, registry: LoopbackRegistry, tmp_path: Path) -> None:
    first = ImageId(await node.pull(one := registry.add("demo/many:1", MANY)))
    await node.pull(two := registry.add("demo/wasm:1", WASM))
    await node.names.add_tag(first, "docker.io/library/app:1")
    data = await save(node, one, "app:1", two)
    assert node.debris() == []
    names = members(data)
    assert names[:3] == ["oci-layout", "index.json", "manifest.json"]
    assert len(set(names)) == len(names)
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    (tmp_path / "other").mkdir()
    other = Node(tmp_path / "other")
    await other.open()
    loading = LoadImages(Archives(other.layout, other.zygote), other.pull_image, other.names, other.progress)
    loaded = {each.id: set(each.tags) async for each in loading(pb.LoadImagesRequest(path=str(path))) if each.id}
    assert loaded == {LINUX.id: {one, "docker.io/library/app:1"}, WASM.id: {two}}
    # A digest of the registry names it there as well: no registry is asked.
    assert await other.pull(f"registry.invalid/x@{MANY.digest}") == LINUX.id
    assert other.debris() == []
    await other.close()


async def test_the_same_images_give_the_same_bytes(node: Node, registry: LoopbackRegistry) -> None:
    await node.pull(tag := registry.add("demo/wasm:1", WASM))
    assert await save(node, tag) == await save(node, tag, WASM.digest.replace("sha256:", f"{tag[:-2]}@sha256:"))


@needs_root
async def test_layers_that_were_dropped_are_fetched_again(node: Node, registry: LoopbackRegistry) -> None:
    await node.pull(tag := registry.add("demo/app:1", LINUX))
    assert BASE.digest not in node.blobs()
    sent = registry.sent[BASE.digest]
    names = members(await save(node, tag))
    assert registry.sent[BASE.digest] == sent + len(BASE.data)
    assert archives.blob_name(BASE.digest) in names
    assert BASE.digest not in node.blobs()


@needs_root
async def test_what_cannot_be_fetched_again_is_said(node: Node, tmp_path: Path) -> None:
    with LoopbackRegistry() as registry:
        await node.pull(tag := registry.add("demo/app:1", LINUX))
    await node.registry.aclose()
    with pytest.raises(PullError, match=r"cannot save 127.*: .*layer sha256:.*; its layers were not kept"):
        await save(node, tag)
    path = archives.write(tmp_path / "a.tar", archives.layout([(DOCKER, {})]))
    loading = LoadImages(Archives(node.layout, node.zygote), node.pull_image, node.names, node.progress)
    async for loaded in loading(pb.LoadImagesRequest(path=str(path))):
        if not loaded.id:
            continue
        with pytest.raises(PullError, match="came without its registry's name"):
            await save(node, loaded.id)
    assert node.debris() == []


async def test_images_that_are_not_there(node: Node) -> None:
    with pytest.raises(NotFound, match="'nothing' is not on this node"):
        await save(node, "nothing")
    with pytest.raises(InvalidArgument, match="no image is named"):
        await save(node)


@needs_root
@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
@pytest.mark.parametrize("image", [LINUX, DOCKER, MANY], ids=["OCI", "docker", "index"])
async def test_skopeo_reads_what_is_saved(
    node: Node, registry: LoopbackRegistry, tmp_path: Path, image: images.Image
) -> None:
    await node.pull(tag := registry.add("demo/app:1", image))
    path = tmp_path / "a.tar"
    path.write_bytes(await save(node, tag))
    chosen = LINUX if image is MANY else image
    if image is not DOCKER:
        await run("skopeo", "copy", f"oci-archive:{path}:{tag}", f"dir:{tmp_path}/oci")
        manifest, files = copied(tmp_path / "oci")
        assert manifest == chosen.manifest.data
        assert {blob.digest.removeprefix("sha256:") for blob in chosen.blobs} <= files
    await run("skopeo", "copy", f"docker-archive:{path}:{tag}", f"dir:{tmp_path}/docker")
    _, files = copied(tmp_path / "docker")
    assert chosen.id.removeprefix("sha256:") in files


@needs_root
@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
async def test_skopeo_reads_the_image_directory(tmp_path: Path, registry: LoopbackRegistry) -> None:
    node = Node(tmp_path, keep_blobs=True)
    await node.open()
    await node.pull(one := registry.add("demo/many:1", MANY))
    await node.pull(two := registry.add("demo/app:1", DOCKER))
    await node.names.add_tag(ImageId(DOCKER.id), "docker.io/library/mine:latest")
    for name, image in ((one, LINUX), (two, DOCKER), ("docker.io/library/mine:latest", DOCKER)):
        place = tmp_path / "copy"
        await run("skopeo", "copy", f"oci:{node.layout.images}:{name}", f"dir:{place}")
        manifest, files = copied(place)
        assert {blob.digest.removeprefix("sha256:") for blob in image.blobs} <= files
        assert (manifest == image.manifest.data) == (image is LINUX)  # docker's is told in the OCI's words
        shutil.rmtree(place)
    await node.remove(two)
    assert listed(node) == {one}
    assert node.debris() == []
    await node.close()


@needs_root
async def test_the_index_lists_what_is_there_in_full(node: Node, registry: LoopbackRegistry) -> None:
    await node.image_layout.write()
    assert listed(node) == set()
    await node.pull(registry.add("demo/app:1", LINUX))
    await node.pull(wasm := registry.add("demo/wasm:1", WASM))
    assert listed(node) == {wasm}
    await node.remove(wasm)
    assert listed(node) == set()


def listed(node: Node) -> set[str]:
    """The names in index.json."""
    entries = json.loads((node.layout.images / "index.json").read_bytes())["manifests"]
    return {entry["annotations"][archives.REF_NAME] for entry in entries}


async def test_what_is_damaged_is_not_listed_and_hides_nothing_else(node: Node, registry: LoopbackRegistry) -> None:
    await node.pull(registry.add("demo/wasm:1", WASM))
    node.layout.blob(Digest(WASM.digest)).unlink()
    await node.pull(other := registry.add("demo/other:1", images.wasm_artifact(b"\0asm other")))
    assert listed(node) == {other}
