"""Pulls from a registry that may misbehave: what is there afterwards, and what the errors say."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import sqlite3
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cri_shim.adapters import store
from cri_shim.flows import image_gc
from cri_shim.model.errors import Code, CriShimError, FailedPrecondition, InvalidArgument, PullError, ResourceExhausted
from cri_shim.model.image import UnfinishedPull
from cri_shim.pb import api_pb2 as pb
from tests.support import images
from tests.support.images import directory, file, layer
from tests.support.loopback_registry import Fault, LoopbackRegistry
from tests.support.puller import Node

WASM = images.wasm_artifact(b"\0asm\x01\0\0\0" + random.Random(1).randbytes(200_000))
FIRST = layer([directory("./"), directory("etc"), file("etc/os", b"test\n")])
SECOND = layer([directory("data"), file("data/noise", random.Random(2).randbytes(300_000))])
LINUX = images.image([FIRST, SECOND], {"Cmd": ["sh"], "User": "1000:1000"})
BOTH = images.index({f"linux/{images.ARCHITECTURE}": LINUX, "wasi/wasm": WASM, "linux/s390x": LINUX})

needs_root = pytest.mark.root


async def test_a_wasm_artifact_needs_no_root_and_no_unpacking(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/hello:1", WASM)
    assert await node.pull(name) == WASM.id
    image = await node.status(name)
    assert image is not None
    assert image.id == WASM.id
    assert list(image.repo_tags) == [name]
    assert list(image.repo_digests) == [f"{registry.address}/demo/hello@{WASM.digest}"]
    assert image.size == sum(len(blob.data) for blob in WASM.blobs)
    (record,) = node.store.images.values()
    assert record.wasm is not None
    assert node.content.path(record.wasm.digest).read_bytes() == WASM.blobs[1].data
    assert node.debris() == []
    await node.remove(name)
    assert (await node.listed(), node.blobs()) == ([], set())


@needs_root
async def test_a_linux_image_is_unpacked_and_its_blobs_are_dropped(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/app:1", LINUX)
    assert await node.pull(name) == LINUX.id
    (record,) = node.store.images.values()
    assert list(record.layers) == [FIRST.diff_id, SECOND.diff_id]
    assert node.blobs() == {LINUX.digest, LINUX.config.digest}
    number = next(layer.number for layer in node.store.layers.values() if layer.key == FIRST.diff_id)
    assert (node.layout.layer(number) / "etc/os").read_text() == "test\n"
    image = await node.status(record.id)
    assert image is not None
    assert (image.uid.value, image.username) == (1000, "")
    assert node.debris() == []


async def test_without_root_a_linux_image_is_refused_before_its_layers_come(
    node: Node, registry: LoopbackRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.pull_image.puller.layers, "_privileged", False)
    with pytest.raises(FailedPrecondition, match="without root cannot unpack Linux layers; run the daemon as root"):
        await node.pull(registry.add("demo/app:1", LINUX))
    assert not any(FIRST.digest in request for request in registry.requests)
    assert (node.blobs(), node.debris()) == (set(), [])


async def test_by_digest_and_by_both(node: Node, registry: LoopbackRegistry) -> None:
    registry.add("demo/hello:1", WASM)
    by_digest = f"{registry.address}/demo/hello@{WASM.digest}"
    await node.pull(by_digest)
    image = await node.status(by_digest)
    assert image is not None
    assert (list(image.repo_tags), list(image.repo_digests)) == ([], [by_digest])
    asked = len(registry.requests)
    await node.pull(f"{registry.address}/demo/hello:1@{WASM.digest}")
    assert len(registry.requests) == asked, "content by digest is there: nobody has to be asked"
    assert await node.status(f"{registry.address}/demo/hello:other@{WASM.digest}") is not None


async def test_one_image_with_many_names_is_one_image(node: Node, registry: LoopbackRegistry) -> None:
    names = [registry.add(name, WASM) for name in ("a/x:1", "a/x:2", "b/y:1")]
    assert {await node.pull(name) for name in names} == {WASM.id}
    (image,) = await node.listed()
    assert list(image.repo_tags) == names
    assert len(image.repo_digests) == 2
    await node.remove(names[1])
    assert await node.listed() == []
    await node.remove(names[1])


async def test_a_tag_that_moves_leaves_the_old_image_nameless(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/hello:1", WASM)
    await node.pull(name)
    newer = images.wasm_artifact(b"\0asm newer")
    registry.add("demo/hello:1", newer)
    await node.pull(name)
    found = {image.id: list(image.repo_tags) for image in await node.listed()}
    assert found == {WASM.id: [], newer.id: [name]}


@needs_root
async def test_the_platform_is_chosen_by_what_is_wanted(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/both:1", BOTH)
    assert await node.pull(name) == LINUX.id
    image = await node.status(name)
    assert image is not None
    assert list(image.repo_digests) == [f"{registry.address}/demo/both@{BOTH.digest}"]
    node.wants_wasm = True
    assert await node.pull(f"{registry.address}/demo/both@{BOTH.digest}") == WASM.id
    assert node.debris() == []


@needs_root
async def test_both_platforms_of_a_tag_can_be_here(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/both:1", BOTH)
    ids = set()
    for node.wants_wasm in (False, True):
        ids.add(await node.pull(name))
    assert ids == {LINUX.id, WASM.id}
    assert [list(image.repo_tags) for image in await node.listed()] == [[name], [name]]
    asked = len(registry.requests)
    for wants_wasm, expected in ((False, LINUX.id), (True, WASM.id), (None, LINUX.id)):
        node.wants_wasm = wants_wasm
        assert await node.pull(f"{registry.address}/demo/both@{BOTH.digest}") == expected
    assert len(registry.requests) == asked, "what an index offers is known here"
    spec = pb.ImageSpec(image=name, runtime_handler="wasm")
    assert (await node.query.image_status(pb.ImageStatusRequest(image=spec))).image.id == WASM.id
    registry.add("demo/both:1", images.wasm_artifact(b"\0asm newer"))
    newer = await node.pull(name)
    assert {image.id: list(image.repo_tags) for image in await node.listed()} == {
        LINUX.id: [],
        WASM.id: [],
        newer: [name],
    }
    await node.remove(name)
    assert len(await node.listed()) == 2


async def test_an_image_of_one_kind_is_taken_whatever_was_wanted(node: Node, registry: LoopbackRegistry) -> None:
    registry.add("demo/hello:1", WASM)
    node.wants_wasm = False
    by_digest = f"{registry.address}/demo/hello@{WASM.digest}"
    assert await node.pull(by_digest) == WASM.id
    asked = len(registry.requests)
    assert await node.pull(by_digest) == WASM.id
    assert len(registry.requests) == asked


async def test_no_platform_fits(node: Node, registry: LoopbackRegistry) -> None:
    with pytest.raises(PullError, match="only for: linux/s390x"):
        await node.pull(registry.add("demo/far:1", images.index({"linux/s390x": LINUX})))
    assert node.debris() == []


@needs_root
async def test_layers_are_shared_and_go_with_the_last_image(node: Node, registry: LoopbackRegistry) -> None:
    other = images.image([FIRST, SECOND], {"Cmd": ["other"]})
    one, two = registry.add("demo/one:1", LINUX), registry.add("demo/two:1", other)
    await node.pull(one)
    await node.pull(two)
    fetched = [request for request in registry.requests if FIRST.digest in request]
    assert len(fetched) == 1
    await node.remove(one)
    assert len(node.store.layers.values()) == 2
    await node.remove(two)
    assert (node.store.layers.values(), node.blobs(), node.debris()) == ((), set(), [])


@needs_root
async def test_layers_of_a_container_outlive_the_image(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/app:1", LINUX)
    await node.pull(name)
    node.in_use = set(node.store.layers.keys())
    await node.remove(name)
    assert len(node.store.layers.values()) == 2
    node.in_use = set()
    await node.collector.drop_unused(node.store.layers.keys())
    assert node.debris() == []


@needs_root
async def test_pulls_side_by_side_share_all_work(node: Node, registry: LoopbackRegistry) -> None:
    other = images.image([FIRST, SECOND], {"Cmd": ["other"]})
    names = [registry.add("demo/one:1", LINUX), registry.add("demo/two:1", other)]
    release = registry.hold_blobs()
    pulls = [asyncio.ensure_future(node.pull(name)) for name in names * 4]
    await asyncio.sleep(0.2)
    release.set()
    assert set(await asyncio.gather(*pulls)) == {LINUX.id, other.id}
    for digest in (FIRST.digest, SECOND.digest, LINUX.config.digest):
        assert sum(digest in request for request in registry.requests) == 1
    assert sum("manifests/" in request for request in registry.requests) == 2
    assert node.debris() == []


async def test_five_removes_at_once_all_succeed(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/hello:1", WASM)
    await node.pull(name)
    await asyncio.gather(*(node.remove(name) for _ in range(5)))
    assert (await node.listed(), node.debris()) == ([], [])


@needs_root
async def test_a_cancelled_pull_leaves_what_the_next_goes_on_with(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/app:1", LINUX)
    for _ in range(8):
        release = registry.hold_blobs()
        release.set()
        pull = asyncio.ensure_future(node.pull(name))
        await asyncio.sleep(random.Random().random() * 0.15)
        pull.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pull
            await node.remove(name)
    await node.settled()
    assert await node.pull(name) == LINUX.id
    assert node.debris() == []


@needs_root
@pytest.mark.parametrize("shares_layers", [False, True], ids=["layer-record", "image-record"])
async def test_a_pull_cancelled_while_a_record_is_written_leaves_whole_records(
    node: Node, registry: LoopbackRegistry, monkeypatch: pytest.MonkeyPatch, *, shares_layers: bool
) -> None:
    if shares_layers:
        await node.pull(registry.add("demo/other:1", images.image([FIRST, SECOND], {"Cmd": ["other"]})))
    name = registry.add("demo/app:1", LINUX)
    before = len(node.store.images.values())
    with sqlite3.connect(node.layout.database, isolation_level=None, check_same_thread=False) as other:
        begin = node.store.pulls.put

        async def begin_and_lock(pull: UnfinishedPull) -> None:
            await begin(pull)
            other.execute("BEGIN IMMEDIATE")  # from now on no record gets into the database

        monkeypatch.setattr(node.store.pulls, "put", begin_and_lock)
        pull = asyncio.ensure_future(node.pull(name))
        async with asyncio.timeout(60):
            while not (LINUX.config.digest in node.blobs() and any(map(str.isdigit, os.listdir(node.layout.layers)))):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        pull.cancel()
        await asyncio.sleep(0.05)
        other.execute("ROLLBACK")
    other.close()
    with contextlib.suppress(asyncio.CancelledError, ResourceExhausted):  # it has waited too long for the database
        await pull
    await node.settled()
    await asyncio.sleep(0.1)  # what would be written late must show
    assert len(node.store.images.values()) in {before, before + 1}
    for record in node.store.images.values():
        assert all(node.content.has(digest) for digest in record.blobs)
        assert all(node.store.layers.get(layer) is not None for layer in record.layers)


async def test_one_who_leaves_does_not_stop_the_others(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/hello:1", WASM)
    release = registry.hold_blobs()
    leaver, stayer = asyncio.ensure_future(node.pull(name)), asyncio.ensure_future(node.pull(name))
    await asyncio.sleep(0.1)
    leaver.cancel()
    await asyncio.sleep(0.05)
    release.set()
    assert await stayer == WASM.id
    assert leaver.cancelled()


async def test_different_credentials_never_share_a_pull(node: Node, registry: LoopbackRegistry) -> None:
    registry.require_basic("user", "right")
    name = registry.add("demo/hello:1", WASM)
    right, wrong = pb.AuthConfig(username="user", password="right"), pb.AuthConfig(username="user", password="wrong")
    results = await asyncio.gather(node.pull(name, right), node.pull(name, wrong), return_exceptions=True)
    assert results[0] == WASM.id
    assert isinstance(results[1], PullError)
    assert "the credentials given are wrong" in str(results[1])
    assert "wrong" not in str(results[1]).replace("given are wrong", "")


async def test_a_token_is_used_for_all_of_a_pull(node: Node, registry: LoopbackRegistry) -> None:
    registry.require_token("user", "right")
    name = registry.add("demo/hello:1", WASM)
    with pytest.raises(PullError, match="incorrect username or password"):
        await node.pull(name)
    await node.pull(name, pb.AuthConfig(username="user", password="right"))
    assert sum("/token" in request for request in registry.requests) == 2


async def test_credentials_do_not_follow_a_redirect(node: Node, registry: LoopbackRegistry) -> None:
    registry.require_basic("user", "right")
    name = registry.add("demo/hello:1", WASM)
    with LoopbackRegistry() as store:
        store.add("demo/hello:1", WASM)
        registry.redirect_blobs(store)
        await node.pull(name, pb.AuthConfig(username="user", password="right"))
        assert len(store.requests) == 2
        assert store.authorizations == []


MODULE = WASM.blobs[1]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault.LONG, "sends more than the 200008 bytes"),
        (Fault.CORRUPT, f"expected content with digest {MODULE.digest}, the registry sent sha256:"),
        (Fault.NOT_FOUND, "not found at registry"),
        (Fault.ERROR, r"HTTP 500 \(UNKNOWN: the disk is on fire\)"),
        (Fault.LIMITED, "HTTP 429: too many requests"),
        (Fault.CLOSE, "Server disconnected"),
        (Fault.HTML, "expected 200008 bytes, registry .* announces 40"),
        (Fault.OVERSTATE, "expected 200008 bytes, registry .* announces 200015"),
        (Fault.UNDERSTATE, "expected 200008 bytes, registry .* announces 100004"),
        (Fault.DENIED, "HTTP 401"),
    ],
)
async def test_a_bad_blob_is_refused_and_none_of_it_stays(
    node: Node, registry: LoopbackRegistry, fault: Fault, text: str
) -> None:
    name = registry.add("demo/hello:1", WASM)
    registry.fail(MODULE.digest, fault)
    with pytest.raises(PullError, match=text) as caught:
        await node.pull(name)
    assert name in str(caught.value)
    assert (await node.listed(), node.partials(), node.debris()) == ([], {}, [])
    registry.heal()
    assert await node.pull(name) == WASM.id
    assert (node.store.pulls.values(), node.debris()) == ((), [])


@pytest.mark.parametrize("fault", [Fault.TRUNCATE, Fault.SHORT])
async def test_a_connection_that_breaks_again_and_again_costs_no_byte(
    node: Node, registry: LoopbackRegistry, fault: Fault
) -> None:
    registry.fail(MODULE.digest, fault, 12)
    assert await node.pull(registry.add("demo/hello:1", WASM)) == WASM.id
    assert registry.sent[MODULE.digest] == len(MODULE.data)
    assert sum(MODULE.digest in request for request in registry.requests) == 13


async def broken_half_way(node: Node, registry: LoopbackRegistry) -> str:
    """A pull that has failed when half of the module was there; the image to pull."""
    name = registry.add("demo/hello:1", WASM)
    registry.fail(MODULE.digest, Fault.TRUNCATE, 1)
    registry.fail(MODULE.digest, Fault.ERROR)
    with pytest.raises(PullError, match="HTTP 500"):
        await node.pull(name)
    registry.heal()
    assert node.partials() == {MODULE.digest: len(MODULE.data) // 2}
    assert (node.debris(), await node.listed()) == ([], [])
    return name


async def test_the_next_pull_goes_on_where_one_broke(node: Node, registry: LoopbackRegistry) -> None:
    name = await broken_half_way(node, registry)
    assert await node.pull(name) == WASM.id
    assert registry.sent[MODULE.digest] == len(MODULE.data)
    assert registry.sent[WASM.config.digest] == len(WASM.config.data)
    assert (node.store.pulls.values(), node.partials(), node.debris()) == ((), {}, [])


async def test_the_next_daemon_goes_on_where_one_ended(tmp_path: Path, registry: LoopbackRegistry) -> None:
    first = Node(tmp_path)
    await first.open()
    name = await broken_half_way(first, registry)
    await first.close()
    second = Node(tmp_path)
    await second.open()
    assert await second.pull(name) == WASM.id
    assert registry.sent[MODULE.digest] == len(MODULE.data)
    assert (second.partials(), second.debris()) == ({}, [])
    await second.close()


@pytest.mark.parametrize("fault", [Fault.WHOLE, Fault.ELSEWHERE, Fault.REFUSE])
async def test_a_registry_without_ranges_sends_all_again(node: Node, registry: LoopbackRegistry, fault: Fault) -> None:
    name = await broken_half_way(node, registry)
    registry.fail(MODULE.digest, fault, 1)
    assert await node.pull(name) == WASM.id
    assert registry.sent[MODULE.digest] >= len(MODULE.data) * 3 // 2


async def test_bytes_that_were_wrong_are_fetched_again(node: Node, registry: LoopbackRegistry) -> None:
    name = await broken_half_way(node, registry)
    (partial,) = node.layout.partials.iterdir()
    partial.write_bytes(b"something else".ljust(len(MODULE.data) // 2))
    assert await node.pull(name) == WASM.id
    assert registry.sent[MODULE.digest] == len(MODULE.data) * 2


async def test_content_that_was_replaced_is_fetched_again(node: Node, registry: LoopbackRegistry) -> None:
    """By its ETag; without one the digest would say so, at the end."""
    name = registry.add("demo/hello:1", WASM)
    registry.replace_etags()
    registry.fail(MODULE.digest, Fault.TRUNCATE, 1)
    assert await node.pull(name) == WASM.id
    assert registry.starts[MODULE.digest] == [0, len(MODULE.data) // 2, 0]


@needs_root
async def test_layers_that_are_done_are_not_fetched_again(node: Node, registry: LoopbackRegistry) -> None:
    name = registry.add("demo/app:1", LINUX)
    for digest in (FIRST.digest, SECOND.digest):
        registry.fail(SECOND.digest, Fault.TRUNCATE, 1)
        registry.fail(SECOND.digest, Fault.ERROR)
        with pytest.raises(PullError, match="HTTP 500"):
            await node.pull(name)
        registry.heal()
        assert registry.sent[digest] > 0
    assert await node.pull(name) == LINUX.id
    for blob in LINUX.blobs:
        assert registry.sent[blob.digest] == len(blob.data)
    assert (node.store.pulls.values(), node.debris()) == ((), [])


async def test_what_nobody_goes_on_with_is_given_up(
    node: Node, registry: LoopbackRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broken_half_way(node, registry)
    await node.collector.expire()
    assert node.partials()
    monkeypatch.setattr(image_gc, "UNFINISHED_BYTES", len(MODULE.data) // 2)
    await node.collector.expire()
    assert node.is_empty(), "beyond the bound on size: the manifest and the config count too"
    monkeypatch.undo()
    await broken_half_way(node, registry)
    later = node.now() + (image_gc.UNFINISHED_SECONDS + 1) * 1_000_000_000
    node.now = lambda: later
    await node.collector.expire()
    assert node.is_empty()


async def test_a_registry_says_when_to_come_again(
    node: Node, registry: LoopbackRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = registry.add("demo/hello:1", WASM)
    waits: list[float] = []
    sleep = asyncio.sleep

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr("cri_shim.adapters.registry.asyncio.sleep", wait)
    registry.ask_to_wait("7")
    registry.fail("manifests/", Fault.LIMITED, 1)
    assert await node.pull(name) == WASM.id
    assert waits == [7.0]
    registry.ask_to_wait("3600")
    registry.fail("manifests/", Fault.LIMITED)
    with pytest.raises(PullError, match=r"HTTP 429: too many requests .*; it asks to wait 3600 s"):
        await node.pull(name)
    assert waits == [7.0]


async def test_a_registry_that_falls_silent_is_given_up(tmp_path: Path, registry: LoopbackRegistry) -> None:
    node = Node(tmp_path, stall_seconds=2)
    await node.open()
    registry.fail(MODULE.digest, Fault.STALL, 1)
    name = registry.add("demo/hello:1", WASM)
    registry.fail(MODULE.digest, Fault.ERROR)
    with pytest.raises(PullError, match="HTTP 500"):
        await node.pull(name)
    assert node.partials() == {MODULE.digest: len(MODULE.data) // 2}
    registry.heal()
    node.be_patient()
    assert await node.pull(name) == WASM.id
    assert registry.sent[MODULE.digest] == len(MODULE.data)
    await node.close()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault.CORRUPT, "expected content with digest|malformed"),
        (Fault.NOT_FOUND, r"^manifest .*demo/hello:1 not found at registry .*MANIFEST_UNKNOWN"),
        (Fault.ERROR, "^RegistryUnavailable: "),
        (Fault.CLOSE, "^RegistryUnavailable: "),
        (Fault.TRUNCATE, "^RegistryUnavailable: "),
        (Fault.DENIED, r"^registry .* refuses manifest .*HTTP 401.*; give credentials"),
        (Fault.HTML, "malformed"),
    ],
)
async def test_a_bad_manifest_is_refused(node: Node, registry: LoopbackRegistry, fault: Fault, text: str) -> None:
    name = registry.add("demo/hello:1", WASM)
    registry.fail("manifests/", fault)
    with pytest.raises(PullError, match=text):
        await node.pull(name)
    assert node.is_empty()


@needs_root
@pytest.mark.parametrize("fault", [Fault.NOT_FOUND, Fault.CORRUPT, Fault.ERROR])
async def test_one_bad_layer_is_no_image(node: Node, registry: LoopbackRegistry, fault: Fault) -> None:
    registry.fail(SECOND.digest, fault)
    with pytest.raises(PullError, match=f"layer {SECOND.digest} of .*demo/app:1|demo/app:1"):
        await node.pull(registry.add("demo/app:1", LINUX))
    await node.settled()
    assert (await node.listed(), node.partials()) == ([], {})


@needs_root
async def test_wrong_bytes_that_break_the_unpacking_are_told_as_such(node: Node, registry: LoopbackRegistry) -> None:
    """Else they would stay, and every pull would go on with them."""
    name = registry.add("demo/app:1", LINUX)
    registry.fail(SECOND.digest, Fault.CORRUPT, 1)
    with pytest.raises(PullError, match=f"expected content with digest {SECOND.digest}"):
        await node.pull(name)
    assert await node.pull(name) == LINUX.id


@needs_root
async def test_a_layer_that_is_not_what_its_config_says(node: Node, registry: LoopbackRegistry) -> None:
    lie = images.Blob(SECOND.data, SECOND.media_type, FIRST.diff_id)
    with pytest.raises(PullError, match=f"layer {SECOND.digest} of .*: expected content with diff ID {FIRST.diff_id}"):
        await node.pull(registry.add("demo/lie:1", images.image([lie])))
    assert node.is_empty()


async def test_a_registry_that_is_not_there(node: Node) -> None:
    with pytest.raises(PullError, match=r"^RegistryUnavailable: registry 127\.0\.0\.1:1: cannot connect"):
        await node.pull("127.0.0.1:1/demo/hello:1")
    with pytest.raises(PullError, match=r"^RegistryUnavailable: registry registry\.invalid: "):
        await node.pull("registry.invalid/demo/hello:1")


@pytest.mark.parametrize("name", ["", "Bad Name", "a" * 3000, "x@sha256:12", "caf\u00e9"])
async def test_a_bad_name_is_refused(node: Node, name: str) -> None:
    with pytest.raises(InvalidArgument):
        await node.pull(name)


async def test_a_mirror_is_asked_first_and_the_registry_last(node: Node, registry: LoopbackRegistry) -> None:
    with LoopbackRegistry() as mirror:
        mirror.add("library/hello:latest", WASM)
        place = node.certs / "docker.io"
        place.mkdir(parents=True)
        text = f'server = "{registry.url}"\n[host."{mirror.url}"]\ncapabilities = ["pull", "resolve"]\n'
        (place / "hosts.toml").write_text(text)
        assert await node.pull("hello") == WASM.id
        assert registry.requests == []
        assert all("ns=docker.io" in request for request in mirror.requests)
        registry.add("library/other:latest", images.wasm_artifact(b"\0asm other"))
        await node.pull("other")
        mirror.fail("manifests", Fault.ERROR)
        registry.fail("manifests", Fault.NOT_FOUND)
        with pytest.raises(PullError, match=r"not found at .*; before that, 127.*HTTP 500"):
            await node.pull("third")


async def test_a_broken_hosts_file_is_named(node: Node) -> None:
    place = node.certs / "docker.io"
    place.mkdir(parents=True)
    (place / "hosts.toml").write_text("server = [")
    with pytest.raises(FailedPrecondition, match=r"hosts\.toml: "):
        await node.pull("hello")


async def test_tls_needs_a_ca_that_is_known(node: Node, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*request, *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with LoopbackRegistry(tls=context) as secure:
        secure.add("demo/hello:1", WASM)
        port = secure.address.rpartition(":")[2]
        name = f"localhost:{port}/demo/hello:1"
        place = node.certs / f"localhost:{port}"
        place.mkdir(parents=True)
        hosts = place / "hosts.toml"
        hosts.write_text(f'server = "https://localhost:{port}"\n')
        with pytest.raises(PullError, match=r"TLS with registry localhost:.* failed: .*certificate.*; name its CA"):
            await node.pull(name)
        hosts.write_text(f'server = "https://localhost:{port}"\nca = "missing.pem"\n')
        with pytest.raises(FailedPrecondition, match=r"cannot load .*missing\.pem"):
            await node.pull(name)
        hosts.write_text(f'server = "https://localhost:{port}"\nca = "{certificate}"\n')
        assert await node.pull(name) == WASM.id
        await node.remove(name)
        hosts.write_text(f'server = "https://localhost:{port}"\nskip_verify = true\n')
        assert await node.pull(name) == WASM.id


class Small:
    """A file system of a few MiB, and all that takes its room away: a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Leaves so many bytes to others, in whole pages."""
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(os.sysconf("SC_PAGESIZE"))):
                pass
        os.truncate(self._ballast, max(self._ballast.stat().st_size - leave, 0))

    def clear(self) -> None:
        self._ballast.unlink(missing_ok=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(path)], check=True)
    yield Small(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest_asyncio.fixture
async def cramped(small: Small) -> AsyncIterator[Node]:
    """A node on the small file system."""
    node = Node(small.path)
    await node.open()
    yield node
    await node.close()


async def refused_for_want_of_room(node: Node, name: str) -> bool:
    """True when a pull is refused by the right error, and has left nothing; False when it went well."""
    (outcome,) = await asyncio.gather(node.pull(name), return_exceptions=True)
    if outcome == LINUX.id:
        return False
    assert isinstance(outcome, CriShimError)
    assert outcome.code is Code.RESOURCE_EXHAUSTED
    assert outcome.cause == f"no space left on the file system of {node.layout.root}"
    await node.settled()
    assert node.is_empty()
    return True


@needs_root
async def test_a_disk_that_fills_with_content_is_named_and_left_empty(
    small: Small, cramped: Node, registry: LoopbackRegistry
) -> None:
    """Wherever it happens: the journal of the database has its room, so it is a blob or a layer that has none."""
    name = registry.add("demo/app:1", LINUX)
    refused = 0
    for leave in itertools.count(0, 48 << 10):
        small.fill(leave)
        if not await refused_for_want_of_room(cramped, name):
            break
        refused += 1
        small.clear()
    assert refused > 5, "the documents, the blob and the layer take 600 KB"
    small.fill()
    await cramped.remove(name)
    assert cramped.is_empty()


@needs_root
@pytest.mark.parametrize("greedy", [False, True], ids=["room-comes-back", "others-take-what-is-freed"])
async def test_a_database_without_room_is_named_and_leaves_nothing(
    small: Small, registry: LoopbackRegistry, monkeypatch: pytest.MonkeyPatch, *, greedy: bool
) -> None:
    """Wherever it happens: the disk is full from one write of the database on. The journal gets no room beforehand."""
    monkeypatch.setattr(store, "_reserve", lambda _wal: None)
    write, full_from, written = store.Table._write, 0, 0

    async def fill_and_write(table: Any, key: str, record: object, **how: bool) -> None:
        nonlocal written
        written += 1
        if written == full_from or (greedy and written > full_from):
            small.fill()
        await write(table, key, record, **how)

    monkeypatch.setattr(store.Table, "_write", fill_and_write)
    name, refused = registry.add("demo/app:1", LINUX), True
    while refused:
        written, full_from = 0, full_from + 1
        node = Node(small.path)
        await node.open()
        try:
            refused = await refused_for_want_of_room(node, name)
            if not refused:
                await node.remove(name)
                assert node.is_empty(), "what frees room always works"
        finally:
            small.clear()
            await node.close()
        again = Node(small.path)
        try:
            assert again.is_empty(), "the rows went when there was room"
        finally:
            await again.close()
    assert full_from > 4, "the unfinished pull, two layers, the image"


@needs_root
async def test_kept_blobs_make_a_complete_layout(tmp_path: Path, registry: LoopbackRegistry) -> None:
    node = Node(tmp_path, keep_blobs=True)
    await node.open()
    await node.pull(registry.add("demo/app:1", LINUX))
    assert node.blobs() == {LINUX.digest, *(blob.digest for blob in LINUX.blobs)}
    assert sum(FIRST.digest in request for request in registry.requests) == 1
    await node.close()


@needs_root
async def test_start_up_mends_what_a_killed_daemon_left(tmp_path: Path, registry: LoopbackRegistry) -> None:
    linux, wasm = registry.add("demo/app:1", LINUX), registry.add("demo/hello:1", WASM)
    node = Node(tmp_path)
    await node.open()
    await node.pull(linux)
    await node.pull(wasm)
    await node.close()
    layout = node.layout
    (layout.layers / "77.tmp").mkdir()
    (layout.layers / "78" / "x").mkdir(parents=True)
    (layout.partials / "abc").write_bytes(b"x")
    (layout.blob(node.store.images.values()[0].manifest).parent / ("0" * 64)).write_bytes(b"x")
    again = Node(tmp_path)
    await again.open()
    assert {image.id for image in await again.listed()} == {LINUX.id, WASM.id}
    assert again.debris() == []
    (record,) = (record for record in again.store.images.values() if record.wasm is not None)
    await again.close()
    layout.blob(record.manifest).unlink()
    third = Node(tmp_path)
    await third.open()
    assert [image.id for image in await third.listed()] == [LINUX.id]
    assert third.debris() == []
    await third.pull(wasm)
    await third.close()


@needs_root
async def test_from_a_real_registry(node: Node, tmp_path: Path) -> None:
    with images.registry(tmp_path / "registry") as real:
        names = {
            real.push("demo/oci:1", LINUX): LINUX.id,
            real.push("demo/hello:1", WASM): WASM.id,
            real.push(
                "demo/both:1", images.index({f"linux/{images.ARCHITECTURE}": LINUX, "wasi/wasm": WASM})
            ): LINUX.id,
        }
        docker = images.docker_image([layer([file("a")], images.DOCKER_TAR_GZIP)])
        names[real.push("demo/docker:1", docker)] = docker.id
        for name, expected in names.items():
            assert await node.pull(name) == expected
        with pytest.raises(PullError, match=r"manifest .*demo/none:1 not found at registry .*MANIFEST_UNKNOWN"):
            await node.pull(f"{real.address}/demo/none:1")
    with pytest.raises(PullError, match=r"^RegistryUnavailable: "):
        await node.pull(f"{real.address}/demo/oci:1")
    assert node.debris() == []
