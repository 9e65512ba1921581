"""`cri-shim images` beside containers that run, and images on a node that has no registry."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.support import archives, images
from tests.support.cri import container_config, whole_lines
from tests.support.daemon import PROGRAM, Daemon
from tests.support.scale import count

pytestmark = pytest.mark.root


def command(daemon: Daemon, *words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    argv = [str(PROGRAM), "images", *words, "--listen", str(daemon.socket)]
    return subprocess.run(argv, input=data, capture_output=True, check=False, timeout=60)


def test_what_a_container_uses_is_shown_and_kept(shared_lab: Lab) -> None:
    lab = shared_lab
    container = lab.cri.create(lab.pod("runc"), lab.shell("true"))
    (line,) = command(lab.daemon, "ls", lab.busybox).stdout.decode().splitlines()[1:]
    assert line.split()[-1] == "1"
    refused = command(lab.daemon, "rm", lab.busybox)
    assert refused.returncode == 1
    assert f"is used by 1 container(s): {container[:13]}; remove them first" in refused.stderr.decode()
    assert lab.busybox not in command(lab.daemon, "prune", "--dry-run").stdout.decode()


def test_an_image_goes_from_node_to_node_through_a_pipe(shared_lab: Lab, make_daemon: MakeDaemon) -> None:
    """Saved on one, loaded on another that reaches no registry, and run there."""
    saved = command(shared_lab.daemon, "save", shared_lab.busybox)
    assert saved.returncode == 0, saved.stderr
    other = make_daemon()
    loaded = command(other, "load", "--name", "carried:1", data=saved.stdout)
    assert (loaded.returncode, loaded.stdout) == (0, b"loaded docker.io/library/carried:1\n"), loaded.stderr
    assert say_hello(other, "carried:1") == ["hello"]


def test_a_pod_runs_without_any_registry(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    place = tmp_path / "import"
    place.mkdir()
    image = images.busybox_image()
    plain = [archives.plain(layer) for layer in image.blobs[1:]]
    saved = images.Image(image.manifest, (image.config, *plain))
    archives.write(place / "busybox.tar.gz", archives.docker_save([(saved, ("box:1",))]), compressed=True)
    daemon = make_daemon(settings={"images": {"import_dir": str(place)}})
    with daemon.client() as cri:
        deadline = time.monotonic() + 30
        while not (found := cri.images.ListImages(pb.ListImagesRequest()).images):
            assert time.monotonic() < deadline, daemon.log_tail()
            time.sleep(0.05)
    assert [(list(each.repo_tags), each.pinned) for each in found] == [(["docker.io/library/box:1"], True)]
    assert say_hello(daemon, "box:1") == ["hello"]


def say_hello(daemon: Daemon, image: str) -> list[str]:
    with daemon.client() as cri:
        pod = cri.run_pod(daemon.pod_config(), "runc")
        container = cri.run(pod, container_config(image, "echo", "hello"))
        cri.wait_exit(container)
        return whole_lines(cri.log(container))


@pytest.mark.timeout(900)
def test_a_load_that_is_killed_leaves_nothing_wrong(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """At random moments: the next daemon has a sound store, and the same archive is loaded."""
    dice = random.Random(5)
    layers = [images.layer([images.file(f"data/{number}", dice.randbytes(2 << 20))]) for number in range(5)]
    whole = images.image(layers, {"Cmd": ["none"]})
    saved = images.Image(whole.manifest, (whole.config, *map(archives.plain, layers)))
    path = archives.write(tmp_path / "a.tar", archives.docker_save([(saved, ("five:1",))]))
    daemon = make_daemon()
    took = load(daemon, path)
    command(daemon, "rm", "five:1")
    for _ in range(count(full=100, quick=6)):
        argv = [str(PROGRAM), "images", "load", "--listen", str(daemon.socket), str(path)]
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as loading:
            time.sleep(dice.uniform(0, took))
            daemon.kill()
        assert loading.returncode is not None
        daemon.start()
        checked = command(daemon, "check")
        assert (checked.returncode, checked.stdout.splitlines()[-1]) == (0, b"no problems"), checked.stdout
    load(daemon, path)
    assert command(daemon, "check").stdout.startswith(b"1 images, 5 layers, 2 blobs")
    assert len(list((daemon.root / "layers").iterdir())) == 5


def load(daemon: Daemon, path: Path) -> float:
    """Seconds that it took."""
    begin = time.monotonic()
    loaded = command(daemon, "load", str(path))
    assert (loaded.returncode, loaded.stdout) == (0, b"loaded docker.io/library/five:1\n"), loaded.stderr
    return time.monotonic() - begin
