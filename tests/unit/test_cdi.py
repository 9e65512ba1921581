"""CDI: which names are names, what a spec file may say, which device is meant, and what it changes in the spec."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cri_shim.adapters import cdi as reader
from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import cdi


def config(*names: str, **annotations: str) -> pb.ContainerConfig:
    devices = [pb.CDIDevice(name=name) for name in names]
    return pb.ContainerConfig(CDI_devices=devices, annotations={f"cdi.k8s.io/{k}": v for k, v in annotations.items()})


def document(kind: str = "acme.com/gpu", **more: object) -> dict[str, Any]:
    device = {"name": "0", "containerEdits": {"env": ["GPU=0"]}}
    return {"cdiVersion": "0.6.0", "kind": kind, "devices": [device], **more}


def parsed(content: object) -> cdi.Spec:
    return cdi.parse_spec(json.dumps(content).encode(), yaml=False)


def with_edits(**edits: object) -> dict[str, Any]:
    return document(devices=[{"name": "0", "containerEdits": edits}])


class TestNames:
    def test_field_and_annotations_each_once(self) -> None:
        asked = config("a.com/gpu=0", "b/nic=x.1", b="a.com/gpu=0", a="c/d=all, e_f/g-h=i:j")
        assert cdi.device_names(asked) == ("a.com/gpu=0", "b/nic=x.1", "c/d=all", "e_f/g-h=i:j")

    def test_others_annotations_are_none(self) -> None:
        assert cdi.device_names(pb.ContainerConfig(annotations={"cdi.example/x": "y"})) == ()

    @pytest.mark.parametrize(
        "name",
        ["", "gpu", "gpu=0", "a/b", "a/b=", "/b=c", "a/=c", "1a/b=c", "a-/b=c", "a/b.c=d", "a/b=-", "a/b=c d", "a/é=c"],
    )
    def test_what_is_no_name(self, name: str) -> None:
        with pytest.raises(InvalidArgument, match=r"^CDI_devices: .* is not of the form vendor/class=name$"):
            cdi.device_names(config(name))
        with pytest.raises(InvalidArgument, match=r"^annotations cdi.k8s.io/x: "):
            cdi.device_names(config(x=f"a/b=c,{name}"))


class TestSpecFiles:
    def test_yaml_and_json_say_the_same(self) -> None:
        text = b"cdiVersion: 0.6.0\nkind: acme.com/gpu\ndevices:\n- name: '0'\n  containerEdits: {env: [GPU=0]}\n"
        assert cdi.parse_spec(text, yaml=True) == parsed(document())

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([], "Expected `object`"),
            (document(cdiVersion="2.0.0"), "cdiVersion '2.0.0'"),
            (document("gpu"), "kind 'gpu'"),
            (document(devices=[document()["devices"][0]] * 2), "device '0' is listed twice"),
            (document(devices=[{"name": "a b", "containerEdits": {}}]), "device 'a b'"),
            (document(devices=[{"name": "0"}]), "missing required field `containerEdits`"),
            (document(further=1), "unknown field `further`"),
            (with_edits(netDevices=[]), "unknown field `netDevices`"),
            (with_edits(env=["GPU"]), "env 'GPU'"),
            (with_edits(env=["=x"]), "env '=x'"),
            (with_edits(deviceNodes=[{"path": "dev/x"}]), "'dev/x' is not an absolute path"),
            (with_edits(deviceNodes=[{"path": "/dev/x", "permissions": "rx"}]), "permissions 'rx' of /dev/x"),
            (with_edits(deviceNodes=[{"path": "/dev/x", "type": "d"}]), "Invalid enum value 'd'"),
            (with_edits(mounts=[{"hostPath": "/x", "containerPath": "y"}]), "'y' is not an absolute path"),
            (with_edits(hooks=[{"hookName": "later", "path": "/x"}]), "Invalid enum value 'later'"),
            (document(containerEdits={"hooks": [{"hookName": "poststop", "path": "x"}]}), "'x' is not an absolute"),
        ],
    )
    def test_what_cannot_be_done_in_full_is_an_error(self, content: object, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            parsed(content)

    def test_text_that_is_neither(self) -> None:
        for yaml in (True, False):
            with pytest.raises(ValueError, match=r"."):
                cdi.parse_spec(b"{\xff", yaml=yaml)


class TestResolve:
    @staticmethod
    def file(path: str, priority: int, env: str, kind: str = "a/b") -> cdi.SpecFile:
        devices = [{"name": name, "containerEdits": {"env": [f"{env}{name}=1"]}} for name in ("0", "1")]
        content = document(kind, devices=devices, containerEdits={"env": [f"{env}=1"]})
        return cdi.SpecFile(path, priority, parsed(content))

    def test_a_files_own_edits_come_first_and_once(self) -> None:
        files = [self.file("/1", 0, "X"), self.file("/2", 0, "Y", "c/d")]
        names = ("a/b=1", "c/d=0", "a/b=0")
        assert cdi.resolve(names, files).env == ("X=1", "X1=1", "Y=1", "Y0=1", "X0=1")

    def test_the_later_directory_wins(self) -> None:
        files = [self.file("/etc", 0, "X"), self.file("/run", 1, "Y")]
        assert cdi.resolve(["a/b=0"], files).env == ("Y=1", "Y0=1")

    def test_what_is_not_to_be_had(self) -> None:
        files = [self.file("/1", 0, "X"), self.file("/2", 0, "Y")]
        with pytest.raises(FailedPrecondition, match=r"a/b=7 is in no spec file"):
            cdi.resolve(["a/b=7"], files)
        with pytest.raises(FailedPrecondition, match=r"a/b=0 is ambiguous, it is in /1 and in /2"):
            cdi.resolve(["a/b=0"], files)


BEFORE: dict[str, Any] = {
    "process": {"env": ["PATH=/bin", "A=1"], "user": {"uid": 5, "gid": 6, "additionalGids": [6, 7]}},
    "mounts": [{"destination": path, "type": "bind", "source": "/s", "options": []} for path in ("/a", "/c", "/a/b")],
    "linux": {
        "devices": [{"path": "/dev/x", "type": "c", "major": 9, "minor": 9}],
        "resources": {"devices": [{"allow": False, "access": "rwm"}], "pids": {"limit": 1}},
    },
}


def applied(**edits: Any) -> Mapping[str, Any]:
    before = copy.deepcopy(BEFORE)
    after = cdi.apply(before, parsed(with_edits(**edits)).devices[0].container_edits)
    assert before == BEFORE
    return after


class TestApply:
    def test_nothing(self) -> None:
        assert applied() == BEFORE

    def test_variables(self) -> None:
        assert applied(env=["A=2", "B=x=y"])["process"]["env"] == ["PATH=/bin", "A=2", "B=x=y"]

    def test_groups(self) -> None:
        assert applied(additionalGids=[0, 44, 7])["process"]["user"]["additionalGids"] == [6, 7, 44]

    def test_devices(self) -> None:
        nodes = [
            {"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "permissions": "r", "fileMode": 0o600},
            {"path": "/dev/y", "type": "b", "major": 8, "minor": 1, "uid": 0, "gid": 0},
            {"path": "/dev/p", "type": "p"},
        ]
        linux = applied(deviceNodes=nodes)["linux"]
        assert linux["devices"] == [
            {"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "uid": 5, "gid": 6, "fileMode": 0o600},
            {"path": "/dev/y", "type": "b", "major": 8, "minor": 1, "uid": 0, "gid": 0},
            {"path": "/dev/p", "type": "p", "uid": 5, "gid": 6},
        ]
        assert linux["resources"] == {
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "r"},
                {"allow": True, "type": "b", "major": 8, "minor": 1, "access": "rwm"},
            ],
            "pids": {"limit": 1},
        }

    def test_mounts(self) -> None:
        mounts = [
            {"hostPath": "/new", "containerPath": "/a", "options": ["ro", "nosuid", "bind"]},
            {"hostPath": "tmpfs", "containerPath": "/z/z/z", "type": "tmpfs"},
            {"hostPath": "/plain", "containerPath": "/plain"},
        ]
        made = applied(mounts=mounts)["mounts"]
        assert [mount["destination"] for mount in made] == ["/c", "/a", "/plain", "/a/b", "/z/z/z"]
        assert made[1:3] == [
            {"destination": "/a", "source": "/new", "type": "bind", "options": ["ro", "nosuid", "bind"]},
            {"destination": "/plain", "source": "/plain", "type": "bind", "options": ["rbind"]},
        ]
        assert made[4] == {"destination": "/z/z/z", "source": "tmpfs", "type": "tmpfs", "options": []}

    def test_hooks(self) -> None:
        hooks = [
            {"hookName": "poststop", "path": "/a"},
            {"hookName": "createRuntime", "path": "/b", "args": ["b", "x"], "env": ["E=1"], "timeout": 5},
        ]
        assert applied(hooks=hooks)["hooks"] == {
            "createRuntime": [{"path": "/b", "args": ["b", "x"], "env": ["E=1"], "timeout": 5}],
            "poststop": [{"path": "/a", "args": [], "env": []}],
        }

    def test_cache_allocation(self) -> None:
        assert applied(intelRdt={"closID": "gold"})["linux"]["intelRdt"] == {"closID": "gold"}


class TestReader:
    @staticmethod
    def put(directory: Path, name: str, content: object) -> None:
        directory.mkdir(exist_ok=True)
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))

    def test_files_are_read_anew(self, tmp_path: Path) -> None:
        low, high = tmp_path / "etc", tmp_path / "run"
        with pytest.raises(FailedPrecondition, match=f"acme.com/gpu=0 .*; spec files are looked for in {low}, {high}"):
            reader.edits(["acme.com/gpu=0"], [low, high])
        self.put(low, "a.json", document())
        (low / "sub.json").mkdir()
        assert reader.edits(["acme.com/gpu=0"], [low, high]).env == ("GPU=0",)
        self.put(high, "a.yaml", "{cdiVersion: 1.0.0, kind: acme.com/gpu, devices: [{name: '0', containerEdits: {}}]}")
        assert reader.edits(["acme.com/gpu=0"], [low, high]).env == ()

    def test_a_broken_file_is_named_only_when_it_could_matter(self, tmp_path: Path) -> None:
        self.put(tmp_path, "good.json", document())
        self.put(tmp_path, "bad.json", "{")
        self.put(tmp_path, "ignored.txt", "{")
        assert reader.edits(["acme.com/gpu=0"], [tmp_path]).env == ("GPU=0",)
        with pytest.raises(FailedPrecondition, match=r"acme.com/gpu=1 .*bad.json cannot be used: ") as caught:
            reader.edits(["acme.com/gpu=1"], [tmp_path])
        assert "ignored" not in str(caught.value)

    def test_devices_of_the_host(self, tmp_path: Path) -> None:
        nodes = [{"path": "/dev/mine", "hostPath": "/dev/null"}, {"path": "/dev/zero", "fileMode": 0o600}]
        self.put(tmp_path, "a.json", with_edits(deviceNodes=nodes))
        mine, zero = reader.edits(["acme.com/gpu=0"], [tmp_path]).device_nodes
        assert (mine.type, mine.major, mine.minor) == ("c", 1, 3)
        assert mine.file_mode == os.stat("/dev/null").st_mode & 0o7777
        assert (zero.major, zero.minor, zero.file_mode) == (1, 5, 0o600)

    @pytest.mark.parametrize(
        ("node", "words"),
        [
            ({"path": "/dev/not-there"}, "device /dev/not-there: No such file"),
            ({"path": "/etc/passwd"}, "/etc/passwd is not a device of the type"),
            ({"path": "/dev/null", "type": "b"}, "/dev/null is not a device of the type"),
        ],
    )
    def test_what_is_no_device(self, tmp_path: Path, node: object, words: str) -> None:
        self.put(tmp_path, "a.json", with_edits(deviceNodes=[node]))
        with pytest.raises(FailedPrecondition, match=words):
            reader.edits(["acme.com/gpu=0"], [tmp_path])
