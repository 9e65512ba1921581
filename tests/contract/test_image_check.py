"""A store that was damaged by anybody but us: told in full, and repaired from the registry."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cri_shim.flows import image_check
from cri_shim.flows.image_check import CheckImages
from cri_shim.model.ids import Digest, ImageId
from cri_shim.pb import admin_pb2 as pb
from tests.support import images
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.puller import Node

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers are unpacked by root")

BASE = images.layer([images.directory("etc"), *(images.file(f"etc/{name}", b"x" * 5000) for name in "abcdef")])
TOP = images.layer([images.file("etc/issue", b"top\n")])
LINUX = images.image([BASE, TOP])
WASM = images.wasm_artifact(b"\0asm\x01\0\0\0")
MODULE = WASM.blobs[1]


@pytest.fixture(autouse=True)
def settles_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_check, "_SETTLE_SECONDS", 0.05)


async def check(node: Node, *, repair: bool = False) -> tuple[list[str], list[str], int]:
    """Problems, repairs, and how many problems remain."""
    checking = CheckImages(
        store=node.store,
        content=node.content,
        layers=node.layers,
        modules=node.modules,
        collector=node.collector,
        layout=node.image_layout,
        names=node.names,
        pull=node.pull_image,
    )
    answers = [answer async for answer in checking(pb.CheckImagesRequest(repair=repair))]
    assert answers[-1].WhichOneof("found") == "summary"
    return (
        [answer.problem for answer in answers if answer.problem],
        [answer.repaired for answer in answers if answer.repaired],
        answers[-1].summary.problems,
    )


def blob(node: Node, digest: str) -> Path:
    return node.layout.blob(Digest(digest))


def layer(node: Node, position: int) -> Path:
    record = node.store.layers.get(next(each for each in node.store.images.values() if each.layers).layers[position])
    assert record is not None
    return node.layout.layer(record.number)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(directory: Path) -> None:
    for file in directory.iterdir():
        os.truncate(file, 0)


async def test_a_sound_store_has_no_problems(node: Node, registry: LoopbackRegistry) -> None:
    assert await check(node) == ([], [], 0)
    await node.pull(registry.add("demo/app:1", LINUX))
    await node.pull(registry.add("demo/wasm:1", WASM))
    assert await check(node) == ([], [], 0)
    assert await check(node, repair=True) == ([], [], 0)


DAMAGE: dict[str, tuple[Callable[[Node], object], str]] = {
    "a bit of a module": (lambda node: flip(blob(node, MODULE.digest)), "is not what its digest says"),
    "a config cut short": (lambda node: os.truncate(blob(node, LINUX.id), 7), "has 7 bytes, not"),
    "no manifest": (lambda node: blob(node, LINUX.digest).unlink(), "cannot be read: No such file"),
    "no layer": (lambda node: shutil.rmtree(layer(node, 0)), "is not there"),
    "an empty layer": (lambda node: shutil.rmtree(layer(node, 0) / "etc"), "is not as it was unpacked"),
    "empty files": (lambda node: empty(layer(node, 0) / "etc"), "is not as it was unpacked"),
    "another mode": (lambda node: (layer(node, 1) / "etc/issue").chmod(0o600), "is not as it was unpacked"),
    "one more file": (lambda node: (layer(node, 0) / "etc/more").touch(), "is not as it was unpacked"),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damage_is_told_and_repaired(node: Node, registry: LoopbackRegistry, damage: str) -> None:
    linux = ImageId(await node.pull(app := registry.add("demo/app:1", LINUX)))
    wasm = ImageId(await node.pull(module := registry.add("demo/wasm:1", WASM)))
    for image_id in (linux, wasm):
        await node.names.add_tag(image_id, f"docker.io/library/mine:{image_id[-5:]}")
        await node.names.pin(image_id, image_id)
    before = {image.id: (list(image.repo_tags), list(image.repo_digests)) for image in await node.listed()}
    spoil, text = DAMAGE[damage]
    spoil(node)
    problems, repairs, left = await check(node)
    assert (len(problems), repairs, left) == (1, [], 1)
    assert text in problems[0]
    problems, repairs, left = await check(node, repair=True)
    hurt = module if "module" in damage else app
    assert (len(problems), repairs, left) == (1, [f"image {hurt} was fetched again"], 0)
    assert await check(node) == ([], [], 0)
    assert {image.id: (list(image.repo_tags), list(image.repo_digests)) for image in await node.listed()} == before
    assert all(image.pinned for image in await node.listed())
    assert (layer(node, 0) / "etc/a").read_bytes() == b"x" * 5000
    assert (blob(node, MODULE.digest).read_bytes(), node.debris()) == (MODULE.data, [])


async def test_only_what_was_damaged_is_fetched_again(node: Node, registry: LoopbackRegistry) -> None:
    await node.pull(registry.add("demo/app:1", LINUX))
    shutil.rmtree(layer(node, 1))
    sent = {each.digest: registry.sent[each.digest] for each in (BASE, TOP)}
    await check(node, repair=True)
    assert registry.sent[BASE.digest] == sent[BASE.digest]
    assert registry.sent[TOP.digest] == sent[TOP.digest] + len(TOP.data)


async def test_an_image_that_cannot_come_back_is_told_to_be_gone(node: Node) -> None:
    with LoopbackRegistry() as registry:
        await node.pull(tag := registry.add("demo/app:1", LINUX))
    await node.registry.aclose()
    flip(blob(node, LINUX.id))
    problems, repairs, left = await check(node, repair=True)
    assert (len(problems), repairs, left) == (2, [], 1)
    assert problems[1].startswith(f"image {tag} is gone: RegistryUnavailable")
    assert problems[1].endswith("pull it again")
    assert (await node.listed(), node.debris()) == ([], [])
    assert await check(node) == ([], [], 0)


async def test_a_layer_under_a_container_stays(node: Node, registry: LoopbackRegistry) -> None:
    await node.pull(registry.add("demo/app:1", LINUX))
    node.in_use = set(node.store.images.values()[0].layers)
    shutil.rmtree(layer(node, 0) / "etc")
    problems, repairs, left = await check(node, repair=True)
    assert (len(problems), repairs, left) == (2, [], 1)
    assert "is in use and stays" in problems[1]
    assert layer(node, 0).is_dir()


async def test_what_belongs_to_nothing_is_removed(node: Node, registry: LoopbackRegistry) -> None:
    await node.pull(registry.add("demo/app:1", LINUX))
    (node.layout.images / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"x")
    (node.layout.layers / "77" / "etc").mkdir(parents=True)
    problems, _, left = await check(node)
    assert ([problem.rpartition("/")[2] for problem in problems], left) == (
        [f"{'0' * 64} belongs to nothing", "77 belongs to nothing"],
        2,
    )
    problems, repairs, left = await check(node, repair=True)
    assert (len(problems), len(repairs), left) == (2, 2, 0)
    assert node.debris() == []


async def test_a_check_beside_pulls_and_removals_finds_nothing(node: Node, registry: LoopbackRegistry) -> None:
    names = [registry.add("demo/app:1", LINUX), registry.add("demo/wasm:1", WASM)]
    stop = asyncio.Event()

    async def work() -> None:
        while not stop.is_set():
            for name in names:
                await node.pull(name)
            for name in names:
                await node.remove(name)

    working = asyncio.create_task(work())
    for _ in range(10):
        assert await check(node, repair=True) == ([], [], 0)
    stop.set()
    await working
