"""Classes of block IO: which one an annotation means, and what it makes of the devices that fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from cri_shim.adapters import blockio as files
from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.blockio import Disk, asked_class, block_io, parse_classes

TEXT = b"""
Classes:
  slow:
  - Weight: 80
  - Devices: [/dev/a, /dev/b*]
    ThrottleReadBps: 60M
    ThrottleWriteBps: 1Mi
    ThrottleReadIOPS: 10k
    ThrottleWriteIOPS: 5
    Weight: 50
  - Devices: [/dev/b2]
    ThrottleReadBps: 1
  even:
  - Weight: 500
"""
FOUND = {"/dev/a": [Disk(8, 0)], "/dev/b*": [Disk(8, 16), Disk(8, 32)], "/dev/b2": [Disk(8, 32)]}


def test_the_annotations_that_others_know() -> None:
    pod = {
        "blockio.resources.beta.kubernetes.io/pod": "all",
        "blockio.resources.beta.kubernetes.io/container.main": "main",
    }
    own = {"io.kubernetes.cri.blockio-class": "own"}
    assert asked_class("main", own, pod) == ("io.kubernetes.cri.blockio-class", "own")
    assert asked_class("main", {}, pod) == ("blockio.resources.beta.kubernetes.io/container.main", "main")
    assert asked_class("side", {}, pod) == ("blockio.resources.beta.kubernetes.io/pod", "all")
    assert asked_class("main", {}, {}) == ("", "")


def test_a_class() -> None:
    classes = parse_classes(TEXT).classes
    assert block_io(classes["even"], FOUND.__getitem__) == {"weight": 500}
    made = block_io(classes["slow"], FOUND.__getitem__)
    numbers = [{"major": 8, "minor": minor} for minor in (0, 16, 32)]
    assert made == {
        "weight": 80,
        "weightDevice": [{**disk, "weight": 50} for disk in numbers],
        "throttleReadBpsDevice": [
            *({**disk, "rate": 60_000_000} for disk in numbers[:2]),
            {**numbers[2], "rate": 1},
        ],
        "throttleWriteBpsDevice": [{**disk, "rate": 1 << 20} for disk in numbers],
        "throttleReadIOPSDevice": [{**disk, "rate": 10_000} for disk in numbers],
        "throttleWriteIOPSDevice": [{**disk, "rate": 5} for disk in numbers],
    }


def test_a_device_that_is_not_there_is_no_limit_forgotten() -> None:
    with pytest.raises(FailedPrecondition, match="no block device of this node fits '/dev/a'"):
        block_io(parse_classes(TEXT).classes["slow"], lambda _: [])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("Weight: 9", "class 'x': weight 9 is not between 10 and 1000"),
        ("Weight: heavy", "weight 'heavy' is not a quantity"),
        ("ThrottleReadBps: 1M", "a throttle needs Devices"),
        ("{Devices: [/dev/a], ThrottleReadBps: -1}", "throttle_read_bps -1 is not a quantity"),
        ("{Devices: [sda], Weight: 10}", "Devices: 'sda' is not an absolute path"),
        ("Devices: [/dev/a]", "a part says neither weight nor throttle"),
        ("Wait: 1", "unknown field `Wait`"),
    ],
)
def test_what_is_wrong_with_a_file(part: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_classes(f"Classes: {{x: [{part if part.startswith('{') else '{' + part + '}'}]}}".encode())


def test_errors_name_the_annotation(tmp_path: Path) -> None:
    config = pb.ContainerConfig(annotations={"io.kubernetes.cri.blockio-class": "slow"})
    pod = pb.PodSandboxConfig()
    assert files.of_container(pb.ContainerConfig(), pod, "") == {}
    with pytest.raises(FailedPrecondition, match=r"blockio-class: 'slow': this handler has no classes"):
        files.of_container(config, pod, "")
    file = tmp_path / "classes.yaml"
    with pytest.raises(FailedPrecondition, match=r"blockio-class: blockio_config_file .* cannot be used"):
        files.of_container(config, pod, str(file))
    file.write_text("Classes: {even: [{Weight: 100}], odd: []}")
    with pytest.raises(InvalidArgument, match=r"there is no class 'slow' of block IO; there are: even, odd"):
        files.of_container(config, pod, str(file))
    config.annotations["io.kubernetes.cri.blockio-class"] = "even"
    assert files.of_container(config, pod, str(file)) == {"weight": 100}


def test_only_block_devices_fit() -> None:
    assert list(files.disks("/dev/nul*")) == []
    for disk in files.disks("/dev/[sv]d*"):
        device = Path(f"/sys/dev/block/{disk.major}:{disk.minor}")
        assert device.exists()
        assert not (device / "partition").exists()
