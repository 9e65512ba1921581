"""Image volumes: what a container sees of another image, that it cannot change it, and when the mount goes.

Not the images themselves (`test_images`). Asked of the process and of the node's mount table, never of the spec.
"""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from cri_shim.kernel import mounts
from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import images, leftovers
from tests.support import wasm as guests
from tests.support.cri import Pod, container_config, whole_lines
from tests.support.expect import refused
from tests.support.world import unchanged

pytestmark = pytest.mark.root
HANDLERS = pytest.mark.parametrize("handler", ["runc", "crun"])
MISSING = "ImageVolumeMountFailed: mounts: "


@pytest.fixture(scope="module")
def data(registry: images.Registry) -> str:
    """An image of two layers without a shell; its links lead out of it, or would."""
    lower = images.layer(
        [
            images.directory("data", 0o750, uid=7, gid=8),
            images.file("data/one", b"lower\n"),
            images.file("data/hidden", b"x"),
            images.directory("etc"),
            images.file("etc/motd", b"of the image\n"),
        ]
    )
    upper = images.layer(
        [
            images.file("data/one", b"upper\n"),
            images.whiteout("data/hidden"),
            images.file("run", b"#!/bin/sh\necho it runs\n", 0o755),
            images.symlink("absolute", "/etc"),
            images.symlink("upwards", "../../../../../../../../etc"),
            images.symlink("outside", "/proc/self"),
            images.symlink("circle", "circle"),
            images.fifo("fifo"),
        ]
    )
    return registry.push("volumes/data:1", images.image([lower, upper]))


@pytest.fixture(scope="module")
def single(registry: images.Registry) -> str:
    """An image of one layer."""
    return registry.push("volumes/single:1", images.image([images.layer([images.file("only", b"single\n")])]))


def volume(image: str, target: str = "/volume", sub_path: str = "", *, readonly: bool = True) -> pb.Mount:
    return pb.Mount(container_path=target, image=pb.ImageSpec(image=image), image_sub_path=sub_path, readonly=readonly)


def with_volumes(lab: Lab, script: str, *volumes: pb.Mount, name: str = "main") -> pb.ContainerConfig:
    config = lab.shell(script, name=name)
    config.mounts.extend(volumes)
    return config


def mounted(lab: Lab, pod: Pod) -> list[Path]:
    """The image volumes of a pod in the mount table of the node."""
    directory = lab.daemon.state / "pods" / pod.id / "image-volumes"
    return [Path(point) for point in leftovers.mount_points() if Path(point).is_relative_to(directory)]


@HANDLERS
def test_the_files_of_an_image(shared_lab: Lab, handler: str, data: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    image_id = lab.cri.pull(data)
    script = """
        cat /volume/data/one; ls /volume/data; stat -c '%a %u %g' /volume/data; /volume/run
        touch /volume/new 2>&1; rm /volume/data/one 2>&1
        awk '$5 == "/volume" { print substr($6, 1, 2) }' /proc/self/mountinfo
    """
    code, lines = lab.output(pod, with_volumes(lab, script, volume(image_id)))
    assert code == 0, lines
    assert lines[:4] == ["upper", "one", "750 7 8", "it runs"]
    assert all("Read-only file system" in line for line in lines[4:6]), lines
    assert lines[6:] == ["ro"]


@HANDLERS
@pytest.mark.parametrize("name", ["data", "single"])
def test_an_image_cannot_be_made_writable(
    shared_lab: Lab, handler: str, name: str, request: pytest.FixtureRequest
) -> None:
    """Not even by a container that may mount: the layer belongs to every container of that image."""
    lab, pod = shared_lab, shared_lab.pod(handler)
    image = request.getfixturevalue(name)
    lab.cri.pull(image)
    script = "mount -o remount,rw,bind /volume 2>/dev/null; touch /volume/new 2>&1; ls -A /volume | grep -c new"
    config = with_volumes(lab, script, volume(image))
    config.linux.security_context.capabilities.add_capabilities.append("SYS_ADMIN")
    code, lines = lab.output(pod, config)
    assert code == 1, lines
    assert "Read-only file system" in lines[0]
    assert lines[1] == "0"


@HANDLERS
def test_status_names_the_image(shared_lab: Lab, handler: str, data: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    image_id = lab.cri.pull(data)
    config = with_volumes(lab, "true", volume(data, "/a"), volume(image_id, "/b", "etc"))
    config.mounts.append(pb.Mount(host_path=str(lab.daemon.base), container_path="/c", readonly=True))
    container = lab.cri.create(pod, config)
    wanted = [pb.Mount.FromString(mount.SerializeToString()) for mount in config.mounts]
    wanted[0].image.image_ref = wanted[1].image.image_ref = image_id
    assert list(lab.cri.status(container).mounts) == wanted
    assert lab.cri.create(pod, config) == container, "the same request again"


@HANDLERS
def test_sub_paths(shared_lab: Lab, handler: str, data: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    lab.cri.pull(data)
    inside = [
        volume(data, "/d", "data"),
        volume(data, "/f", "data/one"),
        volume(data, "/l", "./absolute/"),
        volume(data, "/u", "upwards"),
        volume(data, "/m", "upwards/motd"),
    ]
    script = "cat /d/one /f /l/motd /u/motd /m; echo x 2>/dev/null >/f || echo kept"
    code, lines = lab.output(pod, with_volumes(lab, script, *inside))
    assert (code, lines) == (0, ["upper", "upper", *["of the image"] * 3, "kept"])


@HANDLERS
@pytest.mark.parametrize(
    ("sub_path", "code", "words"),
    [
        ("not-there", grpc.StatusCode.FAILED_PRECONDITION, f"{MISSING}image_sub_path 'not-there': No such file"),
        ("data/one/x", grpc.StatusCode.FAILED_PRECONDITION, f"{MISSING}image_sub_path 'data/one/x': Not a directory"),
        ("outside", grpc.StatusCode.FAILED_PRECONDITION, f"{MISSING}image_sub_path 'outside': No such file"),
        ("circle", grpc.StatusCode.FAILED_PRECONDITION, f"{MISSING}image_sub_path 'circle': Too many levels"),
        ("fifo", grpc.StatusCode.FAILED_PRECONDITION, f"{MISSING}image_sub_path 'fifo' is neither"),
        ("../etc", grpc.StatusCode.INVALID_ARGUMENT, "image_sub_path of /volume"),
        ("data/../../etc", grpc.StatusCode.INVALID_ARGUMENT, "image_sub_path of /volume"),
        ("/etc", grpc.StatusCode.INVALID_ARGUMENT, "image_sub_path of /volume"),
        ("x" * 300, grpc.StatusCode.INVALID_ARGUMENT, "image_sub_path"),
    ],
)
def test_sub_paths_that_lead_nowhere(
    shared_lab: Lab, handler: str, data: str, sub_path: str, code: grpc.StatusCode, words: str
) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    lab.cri.pull(data)
    with unchanged(lab.daemon), refused(code, words):
        lab.cri.create(pod, with_volumes(lab, "true", volume(data, sub_path=sub_path)))


def test_what_is_no_image_volume(shared_lab: Lab, data: str) -> None:
    lab, pod = shared_lab, shared_lab.pod()
    lab.cri.pull(data)
    bidirectional = volume(data)
    bidirectional.propagation = pb.MountPropagation.PROPAGATION_BIDIRECTIONAL
    both = volume(data)
    both.host_path = "/etc"
    wrong = grpc.StatusCode.INVALID_ARGUMENT
    for mount, code, words in (
        (volume("registry.example/absent:1"), grpc.StatusCode.NOT_FOUND, f"{MISSING}image 'registry.example/absent:1'"),
        (volume(lab.wasm), grpc.StatusCode.FAILED_PRECONDITION, f"{MISSING}image {lab.wasm!r} of /volume has no files"),
        (volume(data, readonly=False), wrong, "readonly of /volume"),
        (volume(""), wrong, "image.image of /volume is empty"),
        (bidirectional, wrong, "propagation of /volume"),
        (both, wrong, "host_path and image of /volume"),
        (pb.Mount(host_path="/etc", container_path="/x", image_sub_path="x"), wrong, "image_sub_path of /x: needs"),
    ):
        with unchanged(lab.daemon), refused(code, words):
            lab.cri.create(pod, with_volumes(lab, "true", mount))


@HANDLERS
def test_one_mount_for_all_containers_of_a_pod(shared_lab: Lab, handler: str, data: str, single: str) -> None:
    lab, pod, other = shared_lab, shared_lab.pod(handler), shared_lab.pod(handler)
    lab.cri.pull(data)
    lab.cri.pull(single)
    with unchanged(lab.daemon):
        first = lab.cri.run(pod, with_volumes(lab, "exec sleep 100", volume(data, "/a"), volume(data, "/b", "etc")))
        second = lab.cri.run(
            pod, with_volumes(lab, "exec sleep 100", volume(data), volume(single, "/s"), name="second")
        )
        elsewhere = lab.cri.run(other, with_volumes(lab, "exec sleep 100", volume(data)))
        assert (len(mounted(lab, pod)), len(mounted(lab, other))) == (2, 1)
        lab.cri.remove(second)
        assert len(mounted(lab, pod)) == 1
        assert lab.cri.exec(first, ["cat", "/b/motd"]).stdout == b"of the image\n"
        lab.cri.remove(first)
        lab.cri.remove(elsewhere)


@HANDLERS
def test_a_stopped_pod_has_no_image_volumes(shared_lab: Lab, handler: str, data: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    image_id = lab.cri.pull(data)
    container = lab.cri.run(pod, with_volumes(lab, "exec sleep 100", volume(data)))
    assert len(mounted(lab, pod)) == 1
    lab.cri.stop_pod(pod)
    assert mounted(lab, pod) == []
    assert lab.cri.status(container).mounts[0].image.image_ref == image_id


@HANDLERS
def test_an_image_that_is_removed_meanwhile(lab: Lab, handler: str, data: str) -> None:
    layers = lab.daemon.root / "layers"
    before = set(layers.iterdir())
    pod = lab.pod(handler)
    for attempt in range(2):
        lab.cri.pull(data)
        container = lab.cri.run(pod, with_volumes(lab, "exec sleep 100", volume(data), name=f"c{attempt}"))
        lab.cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=data)))
        assert len(set(layers.iterdir()) - before) == 2
        assert lab.cri.exec(container, ["cat", "/volume/data/one"]).stdout == b"upper\n"
        lab.cri.remove(container)
        assert set(layers.iterdir()) == before, "the container was the last to have them"
        assert mounted(lab, pod) == []


@HANDLERS
def test_a_daemon_that_dies(lab: Lab, handler: str, data: str) -> None:
    """Its successor has the mounts, and removes one that no container has: its record went first."""
    pod = lab.pod(handler)
    image_id = lab.cri.pull(data)
    container = lab.cri.run(pod, with_volumes(lab, "exec sleep 100", volume(data)))
    lab.daemon.kill()
    lab.daemon.start()
    with lab.daemon.client() as cri:
        assert cri.exec(container, ["cat", "/volume/data/one"]).stdout == b"upper\n"
        assert cri.status(container).mounts[0].image.image_ref == image_id
        again = cri.run(pod, with_volumes(lab, "cat /volume/data/one", volume(data), name="again"))
        assert cri.wait_exit(again).exit_code == 0
        assert len(mounted(lab, pod)) == 1
        kept = mounted(lab, pod)
    lab.daemon.kill()
    left = kept[0].with_name("0" * 64)
    left.mkdir()
    mounts.bind(left, left)
    lab.daemon.start()
    assert mounted(lab, pod) == kept


@pytest.mark.parametrize(("sub_path", "file"), [("", "data/one"), ("data", "one")])
def test_a_wasm_container(shared_lab: Lab, registry: images.Registry, data: str, sub_path: str, file: str) -> None:
    """What an image brings is everybody's, so that a module may read it as any user."""
    lab, pod = shared_lab, shared_lab.pod("wasm")
    lab.cri.pull(data)
    reference = registry.push_wasm(f"volumes/{file.replace('/', '-')}:1", guests.prints_file(3, file))
    lab.cri.pull(reference)
    for user in (0, 1000):
        config = container_config(reference, name=f"of-{user}")
        config.mounts.append(volume(data, sub_path=sub_path))
        config.linux.security_context.run_as_user.value = user
        container = lab.cri.run(pod, config)
        assert lab.cri.wait_exit(container).exit_code == 0
        assert whole_lines(lab.cri.log(container)) == ["upper"]


def test_a_wasm_container_cannot_write(shared_lab: Lab, registry: images.Registry, data: str) -> None:
    lab, pod = shared_lab, shared_lab.pod("wasm")
    lab.cri.pull(data)
    reference = registry.push_wasm("volumes/writes:1", guests.writes_file(3, "new", "x"))
    lab.cri.pull(reference)
    config = container_config(reference)
    config.mounts.append(volume(data))
    assert lab.cri.wait_exit(lab.cri.run(pod, config)).exit_code != 0
