"""A registry that fails in every way at any byte: pulls end right or with a named error, and cost no byte twice."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from cri_shim.model.errors import PullError
from tests.support import images
from tests.support.images import Blob, Image, directory, file, layer
from tests.support.layers import snapshot
from tests.support.loopback_registry import CLEAN_BREAKS, LoopbackRegistry
from tests.support.puller import Node
from tests.support.scale import count, seeded

pytestmark = pytest.mark.root

ODDS = 0.35
ATTEMPTS = 60


def five_layers() -> tuple[Image, list[dict[str, str]]]:
    """An image, and the files of each of its layers."""
    dice = random.Random(5)
    layers: list[Blob] = []
    files: list[dict[str, str]] = []
    for number, media_type in enumerate([images.TAR_GZIP, images.TAR, images.TAR_ZSTD, images.TAR_GZIP, images.TAR]):
        files.append({f"d{number}/{name}": dice.randbytes(dice.randint(1, 20_000)).hex() for name in range(4)})
        entries = [directory(f"d{number}"), *(file(path, text.encode()) for path, text in files[-1].items())]
        layers.append(layer(entries, media_type))
    return images.image(layers, {"Cmd": ["x"]}), files


IMAGE, FILES = five_layers()


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path, stall_seconds=2)
    await made.open()
    yield made
    await made.close()


async def is_pulled(node: Node, name: str) -> bool:
    """False for an error, which must be one that a user can be shown; what is pulled must be right."""
    try:
        assert await node.pull(name) == IMAGE.id
    except PullError:
        assert await node.listed() == []
        return False
    (record,) = node.store.images.values()
    for key, files in zip(record.layers, FILES, strict=True):
        layer_record = node.store.layers.get(key)
        assert layer_record is not None
        seen = snapshot(node.layout.layer(layer_record.number))
        assert {path: found.content for path, found in seen.items() if found.kind == "file"} == files
    return True


async def test_pulls_end_right_or_with_a_named_error(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/app:1", IMAGE)
    registry.misbehave(seeded(), ODDS)
    done = 0
    rounds = count(full=500, quick=25)
    for _ in range(rounds):
        if await is_pulled(node, name):
            done += 1
            await node.remove(name)
            assert node.is_empty()
        await node.settled()
    assert 0 < done < rounds, "the odds are such that some end well and some do not"
    registry.heal()
    node.be_patient()
    assert await is_pulled(node, name)
    assert (node.store.pulls.values(), node.partials(), node.debris()) == ((), {}, [])


async def test_no_byte_that_is_here_is_fetched_again(node: Node, registry: LoopbackRegistry) -> None:
    """Whatever breaks, as long as no wrong byte came and no range was refused."""
    dice = seeded()
    node.be_patient()
    for number in range(count(full=50, quick=5)):
        name = registry.add(f"demo/app:{number}", IMAGE)
        registry.misbehave(dice, 0.7, CLEAN_BREAKS)
        for attempt in range(ATTEMPTS):
            if attempt == ATTEMPTS - 1:
                registry.heal()
            here = node.partials()
            done = {*node.blobs(), *(record.diff_id for record in node.store.layers.values())}
            registry.starts.clear()
            ended_well = await is_pulled(node, name)
            for blob in IMAGE.blobs[1:]:
                starts = registry.starts[blob.digest]
                assert not starts or not done & {blob.digest, blob.diff_id}
                assert starts[:1] in ([], [here.get(blob.digest, 0)])
                assert starts == sorted(starts)
            if ended_well:
                break
            await node.settled()
        await node.remove(name)
        assert node.is_empty()
