"""Modules are compiled when their image comes: once, beside the pull, and for as long as somebody needs them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from cri_shim.adapters.zygote import Zygote
from cri_shim.compose import Flows
from cri_shim.flows import image_compile
from cri_shim.model.ids import Digest, ImageId
from cri_shim.pb import admin_pb2
from cri_shim.pb import api_pb2 as pb
from tests.support import archives, images, wasm
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.wired import wired

HELLO = wasm.assemble(wasm.HELLO)
BROKEN = HELLO[:-3]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digest of each module that was given to a compiler."""
    found: list[str] = []
    run = Zygote.run

    async def counted(self: Zygote, task: str, arguments: Any, *args: Any, **named: Any) -> dict[str, Any]:
        if task.endswith(":compile_module"):
            found.append(arguments["digest"])
        return await run(self, task, arguments, *args, **named)

    monkeypatch.setattr(Zygote, "run", counted)
    return found


@pytest_asyncio.fixture
async def flows(tmp_path: Path, runs: list[str]) -> AsyncIterator[Flows]:
    del runs
    async with wired(tmp_path) as made:
        yield made


async def pull(flows: Flows, name: str) -> ImageId:
    answer = await flows.image["PullImage"](pb.PullImageRequest(image=pb.ImageSpec(image=name)))
    assert isinstance(answer, pb.PullImageResponse)
    return ImageId(answer.image_ref)


async def remove(flows: Flows, image: str) -> None:
    await flows.image["RemoveImage"](pb.RemoveImageRequest(image=pb.ImageSpec(image=image)))


async def used(flows: Flows) -> int:
    answer = await flows.image["ImageFsInfo"](pb.ImageFsInfoRequest())
    assert isinstance(answer, pb.ImageFsInfoResponse)
    return answer.image_filesystems[0].used_bytes.value


async def problems(flows: Flows, *, repair: bool = False) -> list[str]:
    check: Any = flows.admin["CheckImages"]
    answers = [answer async for answer in check(admin_pb2.CheckImagesRequest(repair=repair))]
    return [answer.problem or answer.repaired for answer in answers[:-1]]


def compiled(base: Path) -> dict[str, int]:
    """Digest and size of what is on disk, without what is being written."""
    found = (base / "root" / "wasm").glob("*/*.cwasm")
    return {f"sha256:{path.stem}": path.stat().st_size for path in found}


async def test_the_module_of_an_artifact(
    flows: Flows, registry: LoopbackRegistry, tmp_path: Path, runs: list[str]
) -> None:
    one, two = images.wasm_artifact(HELLO), images.wasm_image(HELLO)
    names = [registry.add("demo/one:1", one), registry.add("demo/two:1", two)]
    for name in names:
        await pull(flows, name)
        await flows.images.compile.drain()
    digest = images.digest(HELLO)
    assert runs == [digest]
    (size,) = compiled(tmp_path).values()
    blobs = {blob.digest: len(blob.data) for image in (one, two) for blob in (image.manifest, *image.blobs)}
    assert await used(flows) == sum(blobs.values()) + size

    listed = await flows.admin["ListImages"](admin_pb2.ListImagesRequest())  # type: ignore[misc]
    assert [image.shared for image in listed.images] == [len(HELLO) + size] * 2
    await remove(flows, names[0])
    assert compiled(tmp_path) == {digest: size}
    await remove(flows, names[1])
    assert compiled(tmp_path) == {}
    assert await used(flows) == 0


async def test_the_module_of_an_archive(flows: Flows, tmp_path: Path) -> None:
    archive = archives.write(tmp_path / "one.tar", archives.layout([(images.wasm_artifact(HELLO), {})]))
    load: Any = flows.admin["LoadImages"]
    assert [answer async for answer in load(admin_pb2.LoadImagesRequest(path=str(archive)))]
    await flows.images.compile.drain()
    assert list(compiled(tmp_path)) == [images.digest(HELLO)]
    pruned = await flows.admin["PruneImages"](admin_pb2.PruneImagesRequest())  # type: ignore[misc]
    assert pruned.freed > 0
    assert compiled(tmp_path) == {}


async def test_pulls_do_not_wait(
    flows: Flows, registry: LoopbackRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a removal, and what comes out afterwards does not stay."""
    release, running, run = asyncio.Event(), asyncio.Event(), Zygote.run

    async def slow(self: Zygote, *args: Any, **named: Any) -> dict[str, Any]:
        running.set()
        await release.wait()
        return await run(self, *args, **named)

    monkeypatch.setattr(Zygote, "run", slow)
    names = [registry.add(f"demo/m{code}:1", images.wasm_artifact(wasm.assemble(wasm.exits(code)))) for code in (3, 4)]
    for name in names:
        await pull(flows, name)
    await running.wait()
    await remove(flows, names[0])
    release.set()
    await flows.images.compile.drain()
    assert list(compiled(tmp_path)) == [images.digest(wasm.assemble(wasm.exits(4)))]


async def test_what_cannot_be_compiled_costs_a_line_in_the_log(
    flows: Flows, registry: LoopbackRegistry, tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_compile, "_MAX_BYTES", 1 << 16)
    large = wasm.assemble(wasm.HELLO.replace("(module", '(module (data "' + "x" * (1 << 16) + '")', 1))
    with capture_logs() as logs:
        for number, module in enumerate((BROKEN, b"\x7fELF native", large, HELLO)):
            await pull(flows, registry.add(f"demo/m{number}:1", images.wasm_artifact(module)))
        await flows.images.compile.drain()
    told = [line for line in logs if line["event"].startswith("module not compiled ahead")]
    assert all(line["log_level"] == "warning" and registry.address in line["image"] for line in told)
    assert ["cannot be compiled" in str(told[0]), "never loaded" in str(told[1]), "too large" in str(told[2])] == [
        True,
        True,
        True,
    ]
    assert runs == [images.digest(BROKEN), images.digest(HELLO)]
    assert list(compiled(tmp_path)) == [images.digest(HELLO)]
    # It is not tried again by who pulls it again.
    await pull(flows, registry.add("demo/again:1", images.wasm_image(BROKEN)))
    await flows.images.compile.drain()
    assert len(runs) == 2


async def test_the_next_daemon_goes_on(tmp_path: Path, registry: LoopbackRegistry, runs: list[str]) -> None:
    """With what one that ended has not come to; and it removes what nobody needs, of other engines too."""
    name = registry.add("demo/one:1", images.wasm_artifact(HELLO))
    async with wired(tmp_path) as flows:
        await flows.images.compile.aclose()
        await pull(flows, name)
    assert runs == []
    old = tmp_path / "root" / "wasm" / "wasmtime-1.0.0-x"
    old.mkdir()
    stray = old.with_name("other-engine") / f"{'0' * 64}.cwasm"
    stray.parent.mkdir()
    for path in (old / f"{'1' * 64}.cwasm", stray, stray.with_name(".cut-short")):
        path.write_bytes(b"x")
    async with wired(tmp_path) as flows:
        await flows.images.compile.drain()
        assert not [*old.parent.glob("wasmtime-1*"), *stray.parent.iterdir()]
        assert runs == [images.digest(HELLO)]
    async with wired(tmp_path) as flows:
        await flows.images.compile.drain()
        assert len(runs) == 1
        assert await used(flows) > sum(compiled(tmp_path).values()) > 0


async def test_a_check_finds_what_belongs_to_nothing(flows: Flows, registry: LoopbackRegistry, tmp_path: Path) -> None:
    await pull(flows, registry.add("demo/one:1", images.wasm_artifact(HELLO)))
    await flows.images.compile.drain()
    assert await problems(flows) == []
    (path,) = (tmp_path / "root" / "wasm").glob("*/*.cwasm")
    stray = path.with_name(f"{'0' * 64}.cwasm")
    stray.write_bytes(b"x")
    assert await problems(flows) == [f"{stray} belongs to nothing"]
    assert await problems(flows, repair=True) == [f"{stray} belongs to nothing", f"{stray} is removed"]
    assert await problems(flows) == []
    assert list(compiled(tmp_path)) == [images.digest(HELLO)]


async def test_an_image_keeps_a_few_modules(flows: Flows, registry: LoopbackRegistry) -> None:
    """The latest that its containers were run with."""
    image_id = await pull(flows, registry.add("demo/one:1", images.wasm_artifact(HELLO)))
    await flows.images.compile.drain()
    digests = [Digest(f"sha256:{number:064}") for number in range(20)]
    for digest in digests:
        await flows.images.modules.use("container", digest, image_id)
    record = flows.images.compile.images.get(image_id)
    assert record is not None
    assert record.modules == tuple(digests[-16:])
