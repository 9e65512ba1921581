"""A disk that is full: what needs room is refused by name and leaves nothing, what frees room always works."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.support import images
from tests.support.cri import container_config
from tests.support.daemon import Daemon
from tests.support.expect import refused
from tests.support.world import unchanged

pytestmark = pytest.mark.root

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
Place = Callable[[Daemon], Path]


@pytest.fixture
def on_tmpfs(make_daemon: MakeDaemon) -> Iterator[Callable[[Place, str], Daemon]]:
    """Starts a daemon one of whose directories is a small file system of its own."""
    with contextlib.ExitStack() as closing:

        def start(place: Place, options: str) -> Daemon:
            daemon = make_daemon()
            daemon.stop()
            point = place(daemon)
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)], check=True)
            closing.callback(subprocess.run, ["umount", "--lazy", str(point)], check=True)
            closing.callback(daemon.stop)
            closing.callback(_remove_all_pods, daemon)
            daemon.start()
            return daemon

        yield start


def _remove_all_pods(daemon: Daemon) -> None:
    with daemon.client() as cri:
        cri.remove_all_pods()


@contextlib.contextmanager
def filled(directory: Path, leave: int = 0) -> Iterator[None]:
    """Nothing more than `leave` bytes can be written to the file system of a directory."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        with contextlib.suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass
        if leave:
            os.truncate(ballast, file.tell() - leave)
    try:
        yield
    finally:
        ballast.unlink()


def root_of(daemon: Daemon) -> Path:
    return daemon.root


def state_of(daemon: Daemon) -> Path:
    return daemon.state


def test_everything_with_a_full_root(
    on_tmpfs: Callable[[Place, str], Daemon], busybox: str, registry: images.Registry
) -> None:
    """The kubelet evicts pods and removes images when the disk is full: that must work then."""
    daemon = on_tmpfs(root_of, "size=64m")
    noise = random.Random(1).randbytes(8 << 20)  # zeros would be a hole in the file
    large = registry.push("test/noise:1", images.image([images.layer([images.file("noise", noise)])]))
    with daemon.client() as cri:
        cri.pull(busybox)
        pod = cri.run_pod(daemon.pod_config())
        container = cri.run(pod, container_config(busybox, "sh", "-c", "trap 'exit 5' TERM; sleep 1000 & wait"))
        other = cri.create(pod, container_config(busybox, "true", name="other"))
        for leave in (0, 4 << 20):
            with (
                filled(daemon.root, leave),
                unchanged(daemon),
                refused(FULL, f"no space left on the file system of {daemon.root}"),
            ):
                cri.pull(large)
        with filled(daemon.root):
            assert cri.exec(container, ["true"]).exit_code == 0
            cri.start(other)
            assert cri.wait_exit(other).exit_code == 0
            cri.stop(container, grace=10)
            assert cri.status(container).exit_code == 5
            cri.remove(container)
            cri.remove(other)
            cri.stop_pod(pod)
            cri.remove_pod(pod)
            cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=busybox)))
            assert not cri.images.ListImages(pb.ListImagesRequest()).images
        cri.pull(large)


@pytest.mark.parametrize("handler", ["runc", "crun", "wasm"])
def test_containers_with_a_full_state(
    on_tmpfs: Callable[[Place, str], Daemon], busybox: str, wasm_hello: str, handler: str
) -> None:
    daemon = on_tmpfs(state_of, "size=8m,mode=711")
    image = wasm_hello if handler == "wasm" else busybox
    command = () if handler == "wasm" else ("sleep", "1000")
    with daemon.client() as cri:
        cri.pull(image)
        pod = cri.run_pod(daemon.pod_config(), handler)
        container = cri.create(pod, container_config(image, *command))
        with filled(daemon.state):
            with unchanged(daemon), refused(FULL, "No space left on device"):
                cri.run_pod(daemon.pod_config(), handler)
            if handler != "wasm":
                with unchanged(daemon), refused(FULL, "No space left on device"):
                    cri.create(pod, container_config(image, *command, name="other"))
            cri.start(container)
            cri.stop(container)
            cri.remove(container)
            cri.stop_pod(pod)
            cri.remove_pod(pod)
        pod = cri.run_pod(daemon.pod_config(), handler)
        cri.run(pod, container_config(image, *command))


def test_no_more_inodes(on_tmpfs: Callable[[Place, str], Daemon], busybox: str, registry: images.Registry) -> None:
    """Each container needs some for its writable layer, each image for its files."""
    daemon = on_tmpfs(root_of, "size=64m,nr_inodes=2000")
    many = registry.push("test/many:1", images.image([images.layer([images.file(f"f{n}") for n in range(1000)])]))
    with daemon.client() as cri:
        cri.pull(busybox)
        pod = cri.run_pod(daemon.pod_config(network=pb.NODE), "crun")
        names = (daemon.root / f"ballast{n}" for n in itertools.count())
        with contextlib.ExitStack() as ballast:
            with contextlib.suppress(OSError):
                for name in names:
                    name.touch()
                    ballast.callback(name.unlink)
            with unchanged(daemon), refused(FULL, "No space left on device"):
                cri.create(pod, container_config(busybox, "true"))
            with unchanged(daemon), refused(FULL, "no space left on the file system"):
                cri.pull(many)
        cri.run(pod, container_config(busybox, "true"))
        cri.pull(many)
