"""What ListImages, ImageStatus and ImageFsInfo say of images that were pulled."""

from __future__ import annotations

from pathlib import Path

import pytest

from cri_shim.pb import api_pb2 as pb
from tests.support import images
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.puller import Node

WASM = images.wasm_artifact(b"\0asm\x01\0\0\0")


async def test_what_images_take_is_known_without_looking(node: Node, registry: LoopbackRegistry) -> None:
    before = await node.query.image_fs_info(pb.ImageFsInfoRequest())
    await node.pull(registry.add("demo/hello:1", WASM))
    after = await node.query.image_fs_info(pb.ImageFsInfoRequest())
    assert before.image_filesystems[0].used_bytes.value == 0
    grown = after.image_filesystems[0]
    assert grown.used_bytes.value == sum(len(blob.data) for blob in WASM.blobs) + len(WASM.manifest.data)
    assert grown.inodes_used.value == 3
    assert Path(grown.fs_id.mountpoint).is_dir()
    (written,) = after.container_filesystems
    assert (written.used_bytes.value, written.inodes_used.value, written.fs_id) == (7, 2, grown.fs_id)
    assert grown.timestamp > before.image_filesystems[0].timestamp


@pytest.mark.parametrize(
    ("user", "uid", "username"),
    [
        ("", None, ""),
        ("0", 0, ""),
        ("1000:50", 1000, ""),
        ("www", None, "www"),
        ("www:grp", None, "www"),
        (":5", None, ""),
    ],
)
async def test_the_user_of_an_image(
    node: Node, registry: LoopbackRegistry, user: str, uid: int | None, username: str
) -> None:
    name = registry.add("demo/user:1", images.wasm_image(b"\0asm", {"User": user}))
    await node.pull(name)
    image = await node.status(name)
    assert image is not None
    assert (image.uid.value if image.HasField("uid") else None, image.username) == (uid, username)


async def test_pinned_images_are_said_to_be(node: Node, registry: LoopbackRegistry) -> None:
    await node.pull(registry.add("demo/pinned-a:1", WASM))
    await node.pull(registry.add("demo/free:1", images.wasm_artifact(b"\0asm free")))
    assert sorted(image.pinned for image in await node.listed()) == [False, True]


async def test_an_image_that_is_not_there_is_no_error(node: Node) -> None:
    assert await node.status("nothing:1") is None
    filtered = pb.ListImagesRequest(filter=pb.ImageFilter(image=pb.ImageSpec(image="nothing")))
    assert list((await node.query.list_images(filtered)).images) == []
