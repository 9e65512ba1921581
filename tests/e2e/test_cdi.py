"""CDI devices: what a container sees of the edits of a spec file, and what becomes of one that is not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.support.expect import eventually, refused
from tests.support.world import unchanged

pytestmark = [pytest.mark.root, pytest.mark.parametrize("handler", ["runc", "crun"])]
UNMET = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As /etc/cdi and /var/run/cdi."""
    base = tmp_path_factory.mktemp("cdi")
    return base / "etc", base / "run"


@pytest.fixture(scope="module")
def cdi_lab(make_shared_daemon: MakeDaemon, directories: tuple[Path, Path], busybox: str) -> Iterator[Lab]:
    dirs = [str(directory) for directory in directories]
    handlers = {name: {"kind": "oci", "path": name, "cdi_dirs": dirs} for name in ("runc", "crun")}
    daemon = make_shared_daemon({"handlers": handlers})
    with daemon.client() as cri:
        cri.pull(busybox)
        yield Lab(daemon, cri, busybox, "")


@pytest.fixture
def lab(cdi_lab: Lab, directories: tuple[Path, Path]) -> Iterator[Lab]:
    """Directories that are empty again."""
    for directory in directories:
        directory.mkdir(exist_ok=True)
        for file in directory.iterdir():
            file.unlink()
    yield cdi_lab
    cdi_lab.cri.remove_all_pods()


def put(directory: Path, edits: dict[str, Any], name: str = "acme.json", **more: object) -> None:
    device = {"name": "one", "containerEdits": edits}
    spec = {"cdiVersion": "0.6.0", "kind": "acme.com/dev", "devices": [device], **more}
    (directory / name).write_text(json.dumps(spec))


def with_device(config: pb.ContainerConfig, name: str = "acme.com/dev=one") -> None:
    config.CDI_devices.add(name=name)


def test_every_edit_is_made(lab: Lab, handler: str, directories: tuple[Path, Path], tmp_path: Path) -> None:
    hooked, stopped, hook = tmp_path / "hooked", tmp_path / "stopped", tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\ncat >"$1"; echo "$OF" >>{tmp_path}/env\n')
    hook.chmod(0o755)
    (tmp_path / "file").write_text("of the vendor\n")
    edits = {
        "env": ["ONE=1", "HOME=/vendor"],
        "deviceNodes": [
            {"path": "/dev/mine", "hostPath": "/dev/null", "permissions": "rw"},
            {"path": "/dev/sub/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 3, "gid": 4},
        ],
        "mounts": [
            {"hostPath": str(tmp_path / "file"), "containerPath": "/vendor/file", "options": ["ro", "bind", "nosuid"]}
        ],
        "hooks": [
            {"hookName": "createRuntime", "path": str(hook), "args": ["hook", str(hooked)], "env": ["OF=create"]},
            {"hookName": "poststop", "path": str(hook), "args": ["hook", str(stopped)], "env": ["OF=stop"]},
        ],
        "additionalGids": [4242],
    }
    put(directories[0], edits, containerEdits={"env": ["COMMON=1"]})
    pod = lab.pod(handler)
    script = """
        echo $COMMON $ONE $HOME; id -G; stat -c '%t:%T %a %u %g' /dev/mine /dev/sub/zero; cat /vendor/file
        echo x >/dev/mine; head -c 3 /dev/sub/zero | wc -c; touch /vendor/file 2>&1
        exit 0
    """
    config = lab.shell(script)
    with_device(config)
    container = lab.cri.run(pod, config)
    assert lab.cri.wait_exit(container).exit_code == 0
    lines = [line.text for line in lab.cri.log(container)]
    assert lines[0] == "1 1 /vendor"
    assert "4242" in lines[1].split()
    mode = f"{os.stat('/dev/null').st_mode & 0o7777:o}"
    assert lines[2:6] == [f"1:3 {mode} 0 0", "1:5 640 3 4", "of the vendor", "3"]
    assert "Read-only file system" in lines[6]
    assert json.loads(hooked.read_text().strip())["id"] == container
    lab.cri.remove(container)
    eventually(stopped.exists)
    assert (tmp_path / "env").read_text().split() == ["create", "stop"]


def test_the_device_is_only_of_who_asks(lab: Lab, handler: str, directories: tuple[Path, Path]) -> None:
    """Held by the devices cgroup, not by the lack of a node."""
    device = next(path for path in (Path("/dev/fuse"), Path("/dev/loop-control")) if path.exists())
    numbers = device.stat().st_rdev
    put(directories[0], {"deviceNodes": [{"path": "/dev/mine", "hostPath": str(device)}]})
    pod = lab.pod(handler)
    script = f"mknod /made c {os.major(numbers)} {os.minor(numbers)}; true </made && echo opened; ls /dev/mine"
    assert lab.say(pod, script, with_device) == ["opened", "/dev/mine"]
    code, lines = lab.output(pod, lab.shell(f"{{ {script}; }} 2>&1", name="plain"))
    assert code != 0
    assert "Operation not permitted" in lines[0]
    assert "No such file" in lines[1]


def test_by_annotation_and_in_yaml(lab: Lab, handler: str, directories: tuple[Path, Path]) -> None:
    (directories[1] / "vendor.yaml").write_text(
        "cdiVersion: 0.3.0\nkind: vendor.com/nic\ndevices:\n- name: all\n  containerEdits:\n    env: [NIC=all]\n"
    )
    put(directories[0], {"env": ["ONE=1"]})
    pod = lab.pod(handler)

    def annotated(config: pb.ContainerConfig) -> None:
        with_device(config)
        config.annotations["cdi.k8s.io/vendor"] = "vendor.com/nic=all,acme.com/dev=one"

    assert lab.say(pod, "echo $NIC $ONE", annotated) == ["all 1"]


def test_a_change_of_the_files_is_seen(lab: Lab, handler: str, directories: tuple[Path, Path]) -> None:
    pod = lab.pod(handler)
    for number, (directory, value) in enumerate([(directories[0], "a"), (directories[0], "b"), (directories[1], "c")]):
        put(directory, {"env": [f"ONE={value}"]})
        assert lab.say(pod, "echo $ONE", with_device, name=f"c{number}") == [value]


def test_a_device_that_is_not_to_be_had(lab: Lab, handler: str, directories: tuple[Path, Path]) -> None:
    pod = lab.pod(handler)
    put(directories[0], {"deviceNodes": [{"path": "/dev/not-there"}]})
    (directories[0] / "broken.yaml").write_text("cdiVersion: [")
    for name, code, words in (
        ("acme.com/dev=two", UNMET, "CDI_devices: acme.com/dev=two is in no spec file of this node"),
        ("acme.com/dev=two", UNMET, "broken.yaml cannot be used"),
        ("acme.com/dev=one", UNMET, "/dev/not-there"),
        ("acme", grpc.StatusCode.INVALID_ARGUMENT, "CDI_devices: 'acme'"),
    ):
        config = lab.shell("true")
        with_device(config, name)
        with unchanged(lab.daemon), refused(code, words):
            lab.cri.create(pod, config)
