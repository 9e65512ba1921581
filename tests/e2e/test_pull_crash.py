"""The daemon killed at any moment of a pull: the next one finishes it, and the disk has what it should have."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.support import images
from tests.support.cri import Cri
from tests.support.daemon import Daemon
from tests.support.images import directory, file, layer
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.scale import count, seeded
from tests.support.world import difference, world_of

pytestmark = pytest.mark.root

NOISE = random.Random(3)
IMAGE = images.image(
    [
        layer([directory(f"d{number}"), *(file(f"d{number}/{name}", NOISE.randbytes(20_000)) for name in range(60))])
        for number in range(5)
    ],
    {"Cmd": ["x"]},
)


@pytest.fixture
def registry() -> Iterator[LoopbackRegistry]:
    with LoopbackRegistry() as started:
        yield started


def pull(daemon: Daemon, name: str, killed: threading.Event) -> None:
    """Until the daemon is gone."""
    with Cri(daemon.socket) as cri:
        try:
            cri.pull(name)
        except grpc.RpcError:
            if not killed.is_set():
                raise


def sizes(daemon: Daemon) -> Mapping[str, tuple[int, int]]:
    """Files and bytes of each kind of content, whatever its directories are called."""
    found = {}
    for name in ("images", "layers", "partial"):
        paths = [Path(top, file) for top, _, files in os.walk(daemon.root / name) for file in files]
        found[name] = (len(paths), sum(path.lstat().st_size for path in paths))
    return found


@pytest.mark.timeout(900)
def test_kill_at_any_moment_of_a_pull(make_daemon: MakeDaemon, registry: LoopbackRegistry) -> None:
    daemon, moments = make_daemon(), seeded()
    name = registry.add("demo/app:1", IMAGE)
    spec = pb.ImageSpec(image=name)
    with daemon.client() as cri:
        cri.pull(name)
        begin = time.monotonic()
        cri.images.RemoveImage(pb.RemoveImageRequest(image=spec))
        cri.pull(name)
        duration = time.monotonic() - begin
    right = sizes(daemon)
    with daemon.client() as cri:
        cri.images.RemoveImage(pb.RemoveImageRequest(image=spec))
    nothing = world_of(daemon)
    for _ in range(count(full=200, quick=6)):
        registry.sent.clear()
        killed = threading.Event()
        puller = threading.Thread(target=pull, args=(daemon, name, killed))
        puller.start()
        time.sleep(moments.uniform(0, duration * 1.2))
        killed.set()
        daemon.kill()
        puller.join(30)
        daemon.start()
        with daemon.client() as cri:
            before = sum(registry.sent.values())
            cri.pull(name)
            assert cri.images.ImageStatus(pb.ImageStatusRequest(image=spec)).image.id == IMAGE.id
            assert sizes(daemon) == right
            assert sum(registry.sent.values()) - before <= sum(len(blob.data) for blob in IMAGE.blobs) + 4096
            cri.images.RemoveImage(pb.RemoveImageRequest(image=spec))
        left = difference(nothing, world_of(daemon))
        assert not [line for line in left if " rows: " in line or str(daemon.root) in line], "\n".join(left)
