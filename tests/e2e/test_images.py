"""Images over the socket: names, ids, errors as the kubelet reads them, and what a running container keeps."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import images
from tests.support.cri import Cri, fault
from tests.support.loopback_registry import Fault, LoopbackRegistry

pytestmark = pytest.mark.root

MODULE = images.wasm_artifact(b"\0asm\x01\0\0\0")


def status(cri: Cri, name: str) -> pb.Image | None:
    answer = cri.images.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=name)))
    return answer.image if answer.HasField("image") else None


def remove(cri: Cri, name: str) -> None:
    cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=name)))


def listed(cri: Cri) -> list[pb.Image]:
    return list(cri.images.ListImages(pb.ListImagesRequest()).images)


def test_an_image_answers_to_every_kind_of_reference(cri: Cri, registry: images.Registry) -> None:
    name = registry.push("names/app:1", MODULE)
    repository = name.removesuffix(":1")
    image_id = cri.pull(name)
    hexadecimal = image_id.removeprefix("sha256:")
    references = (
        image_id,
        hexadecimal,
        hexadecimal[:12],
        name,
        f"{repository}@{MODULE.digest}",
        f"{name}@{MODULE.digest}",
    )
    for reference in references:
        found = status(cri, reference)
        assert found is not None, reference
        assert found.id == image_id
        assert list(found.repo_tags) == [name]
        remove(cri, reference)
        assert status(cri, image_id) is None
        assert cri.pull(name) == image_id
    remove(cri, image_id)
    remove(cri, image_id)


def test_removes_at_once_all_succeed(cri: Cri, registry: images.Registry) -> None:
    names = [registry.push(f"names/many:{number}", MODULE) for number in range(3)]
    assert len({cri.pull(name) for name in names}) == 1
    (image,) = listed(cri)
    assert sorted(image.repo_tags) == sorted(names)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda _: remove(cri, names[0]), range(5)))
    assert listed(cri) == []


def test_a_container_keeps_its_files_and_its_name_when_the_image_goes(lab: Lab) -> None:
    pod = lab.pod()
    container = lab.cri.run(pod, lab.shell("while ! [ -e /go ]; do sleep 0.05; done; ls /bin/busybox /etc/passwd"))
    image_id = lab.cri.status(container).image_id
    layers = lab.daemon.root / "layers"
    remove(lab.cri, lab.busybox)
    assert status(lab.cri, lab.busybox) is None
    assert os.listdir(layers)
    lab.cri.exec(container, ["touch", "/go"])
    found = lab.cri.wait_exit(container)
    assert found.exit_code == 0
    assert found.image_id == image_id
    assert found.image.image
    lab.cri.remove(container)


def test_layers_go_with_the_last_container_of_a_removed_image(lab: Lab) -> None:
    container = lab.cri.run(lab.pod(), lab.shell("true"))
    lab.cri.wait_exit(container)
    remove(lab.cri, lab.busybox)
    lab.cri.remove(container)
    assert os.listdir(lab.daemon.root / "layers") == []


def test_errors_are_what_the_kubelet_looks_for(cri: Cri) -> None:
    with LoopbackRegistry() as registry:
        name = registry.add("faults/app:1", MODULE)
        cases = (
            ("manifests", Fault.NOT_FOUND, grpc.StatusCode.UNKNOWN, f"manifest {name} not found at registry"),
            ("manifests", Fault.ERROR, grpc.StatusCode.UNKNOWN, "RegistryUnavailable: "),
            ("blobs", Fault.TRUNCATE, grpc.StatusCode.UNKNOWN, "RegistryUnavailable: "),
            ("blobs", Fault.CORRUPT, grpc.StatusCode.UNKNOWN, f"config {MODULE.config.digest} of {name}: expected"),
        )
        for part, kind, code, words in cases:
            registry.heal()
            registry.fail(part, kind)
            with pytest.raises(grpc.RpcError) as caught:
                cri.pull(name)
            assert fault(caught.value)[0] is code
            assert fault(caught.value)[1].startswith(words)
    with pytest.raises(grpc.RpcError) as caught:
        cri.pull("Not/Valid")
    assert fault(caught.value)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert listed(cri) == []


def test_a_client_that_gives_up_leaves_nothing(cri: Cri, lab: Lab) -> None:
    with LoopbackRegistry() as registry:
        name = registry.add("slow/app:1", images.wasm_artifact(b"\0asm slow"))
        registry.hold_blobs()
        with pytest.raises(grpc.RpcError) as caught:
            cri.images.PullImage(pb.PullImageRequest(image=pb.ImageSpec(image=name)), timeout=0.3)
        assert fault(caught.value)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        assert status(cri, name) is None


def test_the_image_file_system_is_counted(cri: Cri, registry: images.Registry) -> None:
    def used() -> tuple[int, int]:
        (usage,) = cri.images.ImageFsInfo(pb.ImageFsInfoRequest()).image_filesystems
        assert os.path.isdir(usage.fs_id.mountpoint)
        assert usage.timestamp > 0
        return usage.used_bytes.value, usage.inodes_used.value

    empty = used()
    name = registry.push_busybox("usage/app:1")
    cri.pull(name)
    full = used()
    assert full[0] > empty[0] + 500_000
    assert full[1] > empty[1] + 100
    remove(cri, name)
    assert used() == empty


def test_what_containers_write_is_counted(lab: Lab) -> None:
    """In the next round of the measurements: of one that runs and of one that has ended."""

    def written() -> int:
        (usage,) = lab.cri.images.ImageFsInfo(pb.ImageFsInfoRequest()).container_filesystems
        return usage.used_bytes.value

    pod = lab.pod("runc")
    done = lab.cri.run(pod, lab.shell("dd if=/dev/zero of=/big bs=1M count=5", name="done"))
    lab.cri.wait_exit(done)
    writer = lab.cri.run(pod, lab.shell("dd if=/dev/zero of=/big bs=1M count=3; echo ready; sleep 100", name="writer"))
    lab.cri.wait_log(writer, "ready")
    deadline = time.monotonic() + 60
    while not 8 << 20 <= written() < 9 << 20:
        assert time.monotonic() < deadline, written()
        time.sleep(0.1)


def test_an_image_has_one_id_everywhere_and_for_good(lab: Lab, registry: images.Registry) -> None:
    """Whatever it is called, whoever tells it, and after a restart."""
    image_id = lab.cri.pull(lab.busybox)
    again = registry.push_busybox("another/name:2")
    assert lab.cri.pull(again) == image_id
    container = lab.cri.run(lab.pod("runc"), lab.shell("sleep 100"))

    def ids(cri: Cri) -> set[str]:
        found = status(cri, again)
        assert found is not None
        assert {lab.busybox, again} <= set(found.repo_tags)
        listed = [
            image.id for image in cri.images.ListImages(pb.ListImagesRequest()).images if again in image.repo_tags
        ]
        told = [each.image_id for each in cri.containers() if each.id == container]
        return {found.id, *listed, *told, cri.status(container).image_id}

    assert ids(lab.cri) == {image_id}
    lab.daemon.restart()
    with lab.daemon.client() as cri:
        assert ids(cri) == {image_id}
