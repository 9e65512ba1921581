"""The VOLUMEs that an image declares: a directory of the container's own, with what the image has there."""

from __future__ import annotations

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import images
from tests.support.cri import Pod, container_config
from tests.support.expect import refused
from tests.support.world import unchanged

pytestmark = [pytest.mark.root, pytest.mark.parametrize("handler", ["runc", "crun"])]


@pytest.fixture
def image(shared_lab: Lab, registry: images.Registry) -> str:
    layer = images.layer(
        [
            images.directory("data", 0o750, uid=7, gid=8),
            images.file("data/one", b"of the image\n", 0o640, uid=9, gid=10),
            images.symlink("data/link", "/etc/hostname"),
            images.symlink("linked", "/data"),
            images.file("file", b"x"),
        ]
    )
    volumes: dict[str, object] = {path: {} for path in ("/data", "/linked", "/fresh/", "/proc/x", "/etc/hosts", "/")}
    busybox = images.busybox_image()
    reference = registry.push("volumes/declared:1", images.image([*busybox.blobs[1:], layer], {"Volumes": volumes}))
    shared_lab.cri.pull(reference)
    return reference


def said(lab: Lab, pod: Pod, config: pb.ContainerConfig) -> list[str]:
    code, lines = lab.output(pod, config)
    assert code == 0, lines
    return lines


def shell(image: str, script: str, name: str = "main") -> pb.ContainerConfig:
    return container_config(image, "sh", "-c", script, name=name)


def test_content_owner_and_mode_are_the_images(shared_lab: Lab, handler: str, image: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    script = """
        stat -c '%a %u %g' /data /data/one /linked; cat /data/one; readlink /data/link; ls -A /fresh | wc -l
        grep -c ' /data \\| /fresh ' /proc/self/mountinfo; echo new >/data/new; echo new >/fresh/new; cat /linked/new
    """
    config = shell(image, script)
    config.linux.security_context.readonly_rootfs = True
    said(lab, pod, shell(image, "true", "first"))
    with unchanged(lab.daemon):
        container = lab.cri.run(pod, config)
        assert lab.cri.wait_exit(container).exit_code == 0
        lines = [line.text for line in lab.cri.log(container)]
        assert list(lab.cri.status(container).mounts) == []
        lab.cri.remove(container)
    assert lines == ["750 7 8", "640 9 10", "777 0 0", "of the image", "/etc/hostname", "0", "2", "new"]


def test_each_container_has_its_own(shared_lab: Lab, handler: str, image: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    script = "ls /data | tr '\\n' ' '; touch /data/new; echo"
    for name in ("a", "b"):
        assert said(lab, pod, shell(image, script, name)) == ["link one "]


def test_a_mount_of_the_request_wins(
    shared_lab: Lab, handler: str, image: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    source = tmp_path_factory.mktemp("mine")
    (source / "mine").touch()
    script = "ls /data; ls /fresh; cut -d ' ' -f 5 /proc/self/mountinfo | grep -c /etc/hosts"
    for number, target in enumerate(("/data/", "/linked")):
        config = shell(image, script, f"c{number}")
        config.mounts.append(pb.Mount(host_path=str(source), container_path=target))
        assert said(lab, pod, config) == ["mine", "1"]


def test_a_volume_that_is_a_file(shared_lab: Lab, handler: str, registry: images.Registry) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    layer = images.layer([images.file("file", b"x")])
    busybox = images.busybox_image()
    made = images.image([*busybox.blobs[1:], layer], {"Volumes": {"/file": {}}})
    reference = registry.push("volumes/of-a-file:1", made)
    lab.cri.pull(reference)
    with unchanged(lab.daemon), refused(grpc.StatusCode.FAILED_PRECONDITION, "VOLUME /file is no directory"):
        lab.cri.create(pod, shell(reference, "true"))
