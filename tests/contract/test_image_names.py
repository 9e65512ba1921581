"""Names of images beyond the pull: tags and pins that users give, and tags that are served without a registry."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog

from cri_shim.model.errors import PullError
from cri_shim.model.ids import ImageId
from tests.support import images
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.puller import Node

ONE = images.wasm_artifact(b"\0asm\x01\0\0\0 one")
TWO = images.wasm_artifact(b"\0asm\x01\0\0\0 two")


async def names_of(node: Node, image_id: str) -> tuple[set[str], bool]:
    image = next(image for image in await node.listed() if image.id == image_id)
    return set(image.repo_tags), image.pinned


async def test_a_tag_belongs_to_one_image_and_is_taken_from_the_other(node: Node, registry: LoopbackRegistry) -> None:
    first = ImageId(await node.pull(one := registry.add("demo/one:1", ONE)))
    second = ImageId(await node.pull(two := registry.add("demo/two:1", TWO)))
    assert await node.names.add_tag(first, "docker.io/library/mine:latest")
    assert await names_of(node, first) == ({one, "docker.io/library/mine:latest"}, False)
    assert await node.names.add_tag(second, "docker.io/library/mine:latest")
    assert await names_of(node, first) == ({one}, False)
    assert await names_of(node, second) == ({two, "docker.io/library/mine:latest"}, False)
    await node.names.remove_tag(second, "docker.io/library/mine:latest")
    assert await names_of(node, second) == ({two}, False)


async def test_a_pin_on_a_tag_goes_where_the_tag_goes(node: Node, registry: LoopbackRegistry) -> None:
    tag = registry.add("demo/app:1", ONE)
    old = ImageId(await node.pull(tag))
    await node.names.pin(old, tag)
    assert await names_of(node, old) == ({tag}, True)
    registry.add("demo/app:1", TWO)
    new = await node.pull(tag)
    assert await names_of(node, old) == (set(), False)
    assert await names_of(node, new) == ({tag}, True)


async def test_a_pin_on_an_id_stays_and_survives_a_restart(tmp_path: Path, registry: LoopbackRegistry) -> None:
    node = Node(tmp_path)
    await node.open()
    tag = registry.add("demo/app:1", ONE)
    image_id = ImageId(await node.pull(tag))
    await node.names.pin(image_id, image_id)
    await node.close()
    node = Node(tmp_path)
    await node.open()
    await node.pull(tag)
    assert await names_of(node, image_id) == ({tag}, True)
    await node.names.unpin(image_id, {image_id})
    assert await names_of(node, image_id) == ({tag}, False)
    await node.close()


async def test_names_of_an_image_that_is_gone_are_not_given(node: Node) -> None:
    gone = ImageId(f"sha256:{'0' * 64}")
    assert not await node.names.add_tag(gone, "docker.io/library/mine:latest")
    assert not await node.names.pin(gone, gone)
    assert not await node.names.add_digest(gone, None)
    assert list(await node.listed()) == []


async def test_a_tag_is_served_without_its_registry_where_that_is_allowed(tmp_path: Path) -> None:
    node = Node(tmp_path, serve_local=True)
    await node.open()
    with LoopbackRegistry() as registry:
        tag = registry.add("demo/app:1", ONE)
        image_id = await node.pull(tag)
    await node.registry.aclose()
    with structlog.testing.capture_logs() as lines:
        assert await node.pull(tag) == image_id
    assert [line["log_level"] for line in lines if line["event"] == "image served as it is here"] == ["warning"]
    with pytest.raises(PullError, match=r"^RegistryUnavailable"):
        await node.pull(tag.replace(":1", ":2"))
    await node.close()


async def test_without_that_a_registry_that_is_gone_is_an_error(node: Node) -> None:
    with LoopbackRegistry() as registry:
        tag = registry.add("demo/app:1", ONE)
        await node.pull(tag)
    await node.registry.aclose()
    with pytest.raises(PullError, match=r"^RegistryUnavailable"):
        await node.pull(tag)


async def test_what_the_registry_says_is_never_overruled(tmp_path: Path, registry: LoopbackRegistry) -> None:
    node = Node(tmp_path, serve_local=True)
    await node.open()
    tag = registry.add("demo/app:1", ONE)
    image_id = ImageId(await node.pull(tag))
    other = f"{tag.rpartition(':')[0]}:gone"
    await node.names.add_tag(image_id, other)
    with pytest.raises(PullError, match=r"not found|unknown|no such"):
        await node.pull(other)
    await node.close()
