"""`cri-shim images`, from the words of the command to the records of the daemon and back."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import pytest
import pytest_asyncio

from cri_shim import cli
from cri_shim.cli.progress import Lines
from cri_shim.cli.tables import size
from cri_shim.compose import Flows
from cri_shim.pb import admin_pb2
from cri_shim.pb import api_pb2 as pb
from tests.support import archives, images
from tests.support.command import Command, served
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.wired import CONFIG, wired

MODULE = b"\0asm one"
"""None that could be compiled, which takes room of its own a moment later."""
ONE = images.wasm_artifact(MODULE)
TWO = images.wasm_image(MODULE)
"""With the module of the first, and a config of its own."""
OTHER = images.wasm_artifact(b"\0asm other")


def taken(image: images.Image) -> int:
    """Bytes on the disk, alone."""
    return len(image.manifest.data) + sum(len(blob.data) for blob in image.blobs)


@dataclass(frozen=True, slots=True)
class Bench:
    flows: Flows
    run: Command

    async def pull(self, name: str) -> str:
        answer = await self.flows.image["PullImage"](pb.PullImageRequest(image=pb.ImageSpec(image=name)))
        assert isinstance(answer, pb.PullImageResponse)
        return answer.image_ref

    async def listed(self) -> dict[str, pb.Image]:
        answer = await self.flows.image["ListImages"](pb.ListImagesRequest())
        assert isinstance(answer, pb.ListImagesResponse)
        return {image.id: image for image in answer.images}


@pytest_asyncio.fixture
async def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Bench]:
    settings = msgspec.structs.replace(CONFIG.images, pinned=("*/kept/*",))
    config = msgspec.structs.replace(CONFIG, images=settings)
    async with wired(tmp_path, config) as flows, served(flows, tmp_path / "s", capsys) as command:
        yield Bench(flows, command)


async def test_a_list_shows_what_is_shared(bench: Bench, registry: LoopbackRegistry) -> None:
    await bench.pull(one := registry.add("demo/one:1", ONE))
    await bench.pull(registry.add("demo/two:1", TWO))
    other = await bench.pull(registry.add("demo/other:1", OTHER))
    said = await bench.run("images", "ls", "--output", "json")
    found = {image["tags"][0].partition("/")[2]: image for image in json.loads(said.out)}
    assert set(found) == {"demo/one:1", "demo/two:1", "demo/other:1"}
    assert found["demo/one:1"]["shared"] == found["demo/two:1"]["shared"] == len(MODULE)
    assert found["demo/one:1"]["disk"] == taken(ONE)
    assert found["demo/other:1"] == {
        "id": other,
        "tags": [f"{registry.address}/demo/other:1"],
        "digests": [f"{registry.address}/demo/other@{OTHER.digest}"],
        "platform": "wasip1/wasm",
        "wasm": True,
        "size": sum(len(blob.data) for blob in OTHER.blobs),
        "disk": taken(OTHER),
        "shared": 0,
        "pinned": False,
        "containers": [],
        "pulledAt": found["demo/other:1"]["pulledAt"],
    }
    said = await bench.run("images", "ls", one)
    head, line = said.lines
    assert " ".join(head.split()) == "IMAGE ID PLATFORM SIZE ON DISK SHARED PULLED PINNED CONTAINERS"
    assert line.startswith(f"{one}  ")


async def test_a_tag_goes_alone_and_the_image_with_its_last(bench: Bench, registry: LoopbackRegistry) -> None:
    image_id = await bench.pull(tag := registry.add("demo/one:1", ONE))
    assert (await bench.run("images", "tag", tag, "mine")).out == "docker.io/library/mine:latest\n"
    assert (await bench.run("images", "rm", "mine")).out == "untagged docker.io/library/mine:latest\n"
    assert list((await bench.listed())[image_id].repo_tags) == [tag]
    assert (await bench.run("images", "rm", tag)).lines == [f"untagged {tag}", f"removed {image_id}"]
    assert await bench.listed() == {}


async def test_by_id_and_digest_an_image_goes_under_all_its_names(bench: Bench, registry: LoopbackRegistry) -> None:
    for name in ("id", "digest"):
        image_id = await bench.pull(tag := registry.add("demo/one:1", ONE))
        await bench.run("images", "tag", tag, "mine")
        named = image_id if name == "id" else f"{tag.rpartition(':')[0]}@{ONE.digest}"
        said = await bench.run("images", "rm", named)
        assert said.lines == [f"untagged {tag}", "untagged docker.io/library/mine:latest", f"removed {image_id}"]
        assert await bench.listed() == {}


async def test_pins_are_obeyed_until_force(bench: Bench, registry: LoopbackRegistry) -> None:
    image_id = await bench.pull(tag := registry.add("demo/one:1", ONE))
    assert (await bench.run("images", "pin", tag)).out == f"pinned {tag}\n"
    assert (await bench.listed())[image_id].pinned
    refused = await bench.run("images", "rm", tag)
    assert (refused.status, refused.err) == (1, f"cri-shim: image {tag} is pinned; unpin it, or use force\n")
    assert (await bench.run("images", "prune")).out == "freed 0 B\n"
    assert (await bench.run("images", "unpin", tag)).out == f"unpinned {tag}\n"
    assert not (await bench.listed())[image_id].pinned
    assert (await bench.run("images", "pin", image_id)).out == f"pinned {image_id}\n"
    assert (await bench.run("images", "rm", "--force", tag)).lines == [f"untagged {tag}", f"removed {image_id}"]


async def test_what_the_configuration_pins_no_user_unpins(bench: Bench, registry: LoopbackRegistry) -> None:
    await bench.pull(tag := registry.add("kept/one:1", ONE))
    said = await bench.run("images", "unpin", tag)
    assert (said.status, said.err) == (
        1,
        f"cri-shim: image {tag!r} is pinned by images.pinned of the configuration\n",
    )
    assert (await bench.run("images", "rm", tag)).err.endswith("is pinned; change images.pinned, or use force\n")


async def test_prune_takes_what_nobody_needs_and_says_before_what_that_is(
    bench: Bench, registry: LoopbackRegistry
) -> None:
    kept = await bench.pull(registry.add("kept/one:1", ONE))
    await bench.pull(registry.add("demo/two:1", TWO))
    await bench.pull(registry.add("demo/other:1", OTHER))
    freed = taken(OTHER) + taken(TWO) - len(MODULE)
    dry = await bench.run("images", "prune", "--dry-run")
    assert dry.lines[-1] == f"would free {size(freed)}"
    assert len(dry.lines) == 4
    assert len(await bench.listed()) == 3
    wet = await bench.run("images", "prune")
    assert wet.lines == [
        f"removed {registry.address}/demo/other:1",
        f"removed {registry.address}/demo/two:1",
        f"freed {size(freed)}",
    ]
    assert set(await bench.listed()) == {kept}


async def test_one_that_is_not_there_does_not_stop_the_others(bench: Bench, registry: LoopbackRegistry) -> None:
    image_id = await bench.pull(tag := registry.add("demo/one:1", ONE))
    said = await bench.run("images", "rm", "nothing", "Bad Name", tag)
    assert said.status == 1
    assert said.err.splitlines()[0] == "cri-shim: image 'nothing' is not on this node"
    assert "invalid image reference 'Bad Name'" in said.err
    assert said.lines == [f"untagged {tag}", f"removed {image_id}"]


@pytest.mark.parametrize("tag", [f"mine@sha256:{'0' * 64}", "UPPER", ""])
async def test_no_bad_tag_is_given(bench: Bench, registry: LoopbackRegistry, tag: str) -> None:
    await bench.pull(name := registry.add("demo/one:1", ONE))
    assert (await bench.run("images", "tag", name, tag)).status == 1
    assert [list(image.repo_tags) for image in (await bench.listed()).values()] == [[name]]


def test_without_a_daemon_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "s"
    assert cli.main(["images", "ls", "--listen", str(place)]) == 1
    missing = f"cri-shim: no daemon listens on {place}; start it, or name its socket with --listen\n"
    assert capsys.readouterr().err == missing
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    assert cli.main(["images", "ls", "--listen", str(place)]) == 1
    assert capsys.readouterr().err.startswith(f"cri-shim: the daemon of {place} is gone")


async def test_an_archive_is_loaded_from_a_file_and_from_standard_input(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archives.write(
        tmp_path / "a.tar", archives.layout([(ONE, {archives.CONTAINERD_NAME: "app:1"}), (OTHER, {})])
    )
    said = await bench.run("images", "load", str(path))
    assert said.lines == [
        "loaded docker.io/library/app:1",
        f"loaded {OTHER.id}; it has no name in the archive: give it one by tag",
    ]
    await bench.run("images", "rm", ONE.id, OTHER.id)
    single = archives.write(tmp_path / "b.tar", archives.layout([(ONE, {})]))
    with single.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        said = await bench.run("images", "load", "--name", "mine", "--pin")
    assert said.out == "loaded docker.io/library/mine:latest\n"
    image = (await bench.listed())[ONE.id]
    assert (list(image.repo_tags), image.pinned) == (["docker.io/library/mine:latest"], True)
    refused = await bench.run("images", "load", str(tmp_path / "gone"))
    assert (refused.status, refused.err) == (1, f"cri-shim: {tmp_path}/gone does not exist\n")


async def test_a_pull_tells_how_far_it_has_come(
    bench: Bench, registry: LoopbackRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = registry.add("demo/app:1", ONE)
    show, shown = Lines.show, threading.Event()

    def show_and_tell(lines: Lines, layers: Iterable[admin_pb2.LayerProgress]) -> None:
        show(lines, layers)
        if lines._told:
            shown.set()

    monkeypatch.setattr(Lines, "show", show_and_tell)
    config, module = ONE.blobs

    async def asked_for(digest: str) -> None:
        async with asyncio.timeout(30):
            while not any(digest in request for request in registry.requests):
                await asyncio.sleep(0.05)

    release = registry.hold_blobs()
    pulling = asyncio.create_task(bench.run("images", "pull", tag))
    await asked_for(config.digest)
    release_module = registry.hold_blobs()
    release.set()
    await asked_for(module.digest)
    assert await asyncio.to_thread(shown.wait, 60)
    release_module.set()
    said = await pulling
    assert (said.status, said.out) == (0, f"{ONE.id}\n")
    short = module.digest.removeprefix("sha256:")[:13]
    assert said.err.splitlines() == [f"{short}: downloading (8 B)", f"{short}: done (8 B)"]
    again = await bench.run("images", "pull", tag)
    assert (again.status, again.out) == (0, f"{ONE.id}\n")


async def test_each_of_several_pulls_is_told_apart(bench: Bench, registry: LoopbackRegistry) -> None:
    said = await bench.run("images", "pull", "127.0.0.1:1/demo/gone:1", registry.add("demo/app:1", ONE))
    assert (said.status, said.out) == (1, f"{ONE.id}\n")
    assert "cri-shim: RegistryUnavailable: registry 127.0.0.1:1" in said.err
    refused = await bench.run("images", "pull", "--handler", "no-such", "app")
    assert "'no-such'" in refused.err


async def test_who_leaves_a_pull_ends_it(bench: Bench, registry: LoopbackRegistry) -> None:
    tag = registry.add("demo/app:1", ONE)
    release = registry.hold_blobs()
    request = admin_pb2.PullImageRequest(image=tag)
    answers = cast("AsyncGenerator[admin_pb2.PullImageResponse]", bench.flows.admin["PullImage"](request))
    waiting = asyncio.create_task(_first(answers))
    async with asyncio.timeout(30):
        while not any(ONE.config.digest in asked for asked in registry.requests):
            await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.wait((waiting,))
    await answers.aclose()
    release.set()
    assert await bench.listed() == {}
    assert (await bench.run("images", "pull", tag)).out == f"{ONE.id}\n"


async def _first(answers: AsyncGenerator[admin_pb2.PullImageResponse]) -> admin_pb2.PullImageResponse:
    return await anext(answers)
