"""What a guest of the wasmtime handler sees of files, and what of a request is refused."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cri_shim.kernel import mounts
from cri_shim.model.errors import CriShimError, FailedPrecondition, InvalidArgument, NotFound
from cri_shim.model.handler import ContainerPlan
from cri_shim.pb import api_pb2 as pb
from tests.contract.wasm_bench import ALL_CAPABILITIES, WasmBench, mount, secured, wasm_bench
from tests.support import wasm


@pytest.fixture
async def bench(module_root: Path, tmp_path: Path) -> AsyncIterator[WasmBench]:
    async with wasm_bench(module_root, tmp_path / "state") as made:
        yield made


@pytest.fixture
async def mounting_bench(module_root: Path, tmp_path: Path) -> AsyncIterator[WasmBench]:
    async with wasm_bench(module_root, tmp_path / "state", capabilities=ALL_CAPABILITIES) as made:
        yield made


async def test_a_directory_mount_is_written_through(bench: WasmBench, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    plan = bench.artifact(wasm.writes_file(3, "made", "by wasm"), mounts=[mount(volume, "/data")])
    assert (await bench.finish(plan)).code == 0
    assert (volume / "made").read_text() == "by wasm"


async def test_a_read_only_mount_is_read_only(bench: WasmBench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content\n")
    mounted = [mount(tmp_path, "/data", readonly=True)]
    assert (await bench.finish(bench.artifact(wasm.writes_file(3, "made", "x"), mounts=mounted))).code != 0
    assert not (tmp_path / "made").exists()
    plan = bench.artifact(wasm.prints_file(3, "file"), mounts=mounted)
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == ["content"]


@pytest.mark.parametrize("path", ["../secret", "link", "absolute"])
async def test_there_is_no_way_out_of_a_mount(bench: WasmBench, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret\n")
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "link").symlink_to("../secret")
    (volume / "absolute").symlink_to(tmp_path / "secret")
    plan = bench.artifact(wasm.prints_file(3, path), mounts=[mount(volume, "/data")])
    assert (await bench.finish(plan)).code != 0
    assert bench.entries(plan) == []


async def test_a_missing_mount_source_becomes_a_directory(bench: WasmBench, tmp_path: Path) -> None:
    plan = bench.artifact(wasm.writes_file(3, "made", "x"), mounts=[mount(tmp_path / "new" / "one", "/data")])
    assert (await bench.finish(plan)).code == 0
    assert (tmp_path / "new" / "one" / "made").exists()


async def test_a_read_only_file_mount_without_root_is_a_copy(bench: WasmBench, tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("a = 1\n")
    plan = bench.artifact(
        wasm.prints_file(3, "settings.ini"), mounts=[mount(tmp_path / "settings", "/etc/settings.ini", readonly=True)]
    )
    await bench.finish(plan)
    assert bench.text(plan) == ["a = 1"]
    await bench.handler.delete(plan.id, "")
    assert list(plan.bundle.iterdir()) == []


def refused_mounts(tmp_path: Path) -> Iterator[tuple[pb.Mount, str]]:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    yield mount(tmp_path / "fifo", "/f"), "neither a directory nor a file"
    yield mount(tmp_path / "file", "/f"), "single writable file needs root"
    yield mount(tmp_path, "/"), "not a path below /"
    yield pb.Mount(host_path=str(tmp_path), container_path="/f", mount_options=["noexec"]), "mount_options of /f"
    yield pb.Mount(host_path=str(tmp_path), container_path="/f", uidMappings=[pb.IDMapping()]), "uidMappings of /f"
    bidirectional = pb.MountPropagation.PROPAGATION_BIDIRECTIONAL
    yield pb.Mount(host_path=str(tmp_path), container_path="/f", propagation=bidirectional), "BIDIRECTIONAL"


async def test_mounts_that_cannot_be_honoured_are_refused_by_name(bench: WasmBench, tmp_path: Path) -> None:
    for asked, words in refused_mounts(tmp_path):
        plan = bench.artifact(wasm.HELLO, mounts=[asked])
        with pytest.raises(CriShimError, match=words):
            await bench.handler.create(plan)
        assert list(plan.bundle.iterdir()) == []


NODE, TARGET = pb.NamespaceMode.NODE, pb.NamespaceMode.TARGET
REFUSED: Mapping[str, dict[str, Any]] = {
    "devices": {"devices": [pb.Device(host_path="/dev/null")]},
    "CDI_devices": {"CDI_devices": [pb.CDIDevice(name="v/c=d")]},
    "annotations": {"annotations": {"cdi.k8s.io/x": "y"}},
    "privileged": {"linux": secured(privileged=True)},
    "pid: NODE": {"linux": secured(namespace_options=pb.NamespaceOption(pid=NODE))},
    "pid: TARGET": {"linux": secured(namespace_options=pb.NamespaceOption(pid=TARGET))},
    "ipc: NODE": {"linux": secured(namespace_options=pb.NamespaceOption(ipc=NODE))},
    "userns_options": {
        "linux": secured(
            namespace_options=pb.NamespaceOption(userns_options=pb.UserNamespace(mode=pb.NamespaceMode.POD))
        )
    },
    "add_capabilities": {"linux": secured(capabilities=pb.Capability(add_capabilities=["NET_ADMIN"]))},
    "seccomp": {
        "linux": secured(seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.Localhost, localhost_ref="x"))
    },
    "apparmor": {"linux": secured(apparmor_profile="localhost/x")},
    "selinux_options": {"linux": secured(selinux_options=pb.SELinuxOption(type="t"))},
    "masked_paths": {"linux": secured(masked_paths=["/etc"])},
    "readonly_paths": {"linux": secured(readonly_paths=["/developer"])},
    "unified": {
        "linux": pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(unified={"memory.high": "1000000"}))
    },
    "cpuset_cpus": {"linux": pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(cpuset_cpus="x"))},
}


@pytest.mark.parametrize("field", REFUSED)
async def test_fields_that_cannot_be_honoured_are_refused_by_name(bench: WasmBench, field: str) -> None:
    plan = bench.artifact(wasm.HELLO, **REFUSED[field])
    with pytest.raises(CriShimError, match=field):
        await bench.handler.create(plan)
    assert list(plan.bundle.iterdir()) == []


async def test_fields_that_change_nothing_for_a_module_are_accepted(bench: WasmBench) -> None:
    default = pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
    linux = secured(
        seccomp=default,
        apparmor=default,
        no_new_privs=True,
        masked_paths=["/proc/kcore", "/sys/firmware"],
        readonly_paths=["/proc/sys"],
        supplemental_groups=[7],
        capabilities=pb.Capability(add_capabilities=["NET_BIND_SERVICE"], drop_capabilities=["ALL"]),
        namespace_options=pb.NamespaceOption(network=NODE, pid=pb.NamespaceMode.CONTAINER),
    )
    linux.resources.CopyFrom(
        pb.LinuxContainerResources(cpu_shares=2, cpu_quota=5000, cpu_period=100000, oom_score_adj=-998, cpuset_cpus="0")
    )
    assert (await bench.finish(bench.artifact(wasm.HELLO, linux=linux))).code == 0


# Ordinary images with a module in their root file system.


def with_rootfs(plan: ContainerPlan, rootfs: Path, *args: str, path: str = "/bin") -> ContainerPlan:
    assert plan.image is not None
    process = replace(plan.process, args=args, env=(f"PATH={path}",))
    return replace(plan, image=msgspec.structs.replace(plan.image, wasm=None), rootfs=rootfs, process=process)


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    for directory in ("bin", "srv", "etc"):
        (root / directory).mkdir(parents=True)
    return root


@pytest.mark.parametrize("word", ["/srv/app.wasm", "srv/app.wasm", "app.wasm", "tool", "/link"])
async def test_the_module_is_looked_up_in_the_image(bench: WasmBench, rootfs: Path, word: str) -> None:
    code = wasm.assemble(wasm.ECHO)
    (rootfs / "srv/app.wasm").write_bytes(code)
    (rootfs / "bin/tool").write_bytes(code)
    (rootfs / "link").symlink_to("/srv/app.wasm")
    plan = with_rootfs(bench.artifact(wasm.HELLO), rootfs, word, "x")
    cwd = "/srv" if word == "app.wasm" else "/"
    plan = replace(plan, process=replace(plan.process, cwd=cwd, env=("PATH=/none:/bin",)))
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan)[:2] == [word, "x"]


async def test_a_module_outside_of_the_image_is_not_found(bench: WasmBench, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.wasm").write_bytes(wasm.assemble(wasm.HELLO))
    (rootfs / "link").symlink_to(tmp_path / "outside.wasm")
    (rootfs / "circle").symlink_to("circle")
    for word in ("../outside.wasm", "/link", "nothing", "/srv", "/circle", "x" * 256, "/srv/" + "x" * 5000):
        with pytest.raises(NotFound, match="not in the image"):
            await bench.handler.create(with_rootfs(bench.artifact(wasm.HELLO), rootfs, word))


@pytest.mark.parametrize("readonly", [False, True])
async def test_the_root_file_system_is_the_guests_root(bench: WasmBench, rootfs: Path, readonly: bool) -> None:
    (rootfs / "bin/app").write_bytes(wasm.assemble(wasm.writes_file(3, "srv/made", "x")))
    plan = with_rootfs(bench.artifact(wasm.HELLO, linux=secured(readonly_rootfs=readonly)), rootfs, "app")
    assert ((await bench.finish(plan)).code == 0) is not readonly
    assert (rootfs / "srv/made").exists() is not readonly


# The pod's own files.


@pytest.mark.parametrize("name", ["hosts", "hostname", "resolv.conf"])
async def test_the_files_of_the_pod_are_there(bench: WasmBench, name: str) -> None:
    (bench.pod.resolv_conf.parent / name).write_text(f"the pod's {name}\n")
    plan = bench.artifact(wasm.prints_file(3, name))
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == [f"the pod's {name}"]
    assert (await bench.finish(bench.artifact(wasm.writes_file(3, name, "x")))).code != 0
    assert (bench.pod.resolv_conf.parent / name).read_text() == f"the pod's {name}\n"


@pytest.mark.parametrize("readonly", [False, True])
async def test_the_files_of_the_pod_go_over_those_of_an_image(bench: WasmBench, rootfs: Path, readonly: bool) -> None:
    bench.pod.resolv_conf.write_text("nameserver 192.0.2.1\n")
    (rootfs / "etc/resolv.conf").symlink_to("/run/resolv.conf")
    (rootfs / "etc/hostname").mkdir()
    (rootfs / "bin/app").write_bytes(wasm.assemble(wasm.prints_file(3, "etc/resolv.conf")))
    plan = with_rootfs(bench.artifact(wasm.HELLO, linux=secured(readonly_rootfs=readonly)), rootfs, "app")
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == ["nameserver 192.0.2.1"]
    assert not (rootfs / "run").exists()
    assert (rootfs / "etc/hostname").is_dir()


async def test_a_mount_goes_over_the_files_of_the_pod(bench: WasmBench, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("of the request\n")
    mounts_asked = {
        "/etc/hosts": mount(tmp_path / "hosts", "/etc/hosts", readonly=True),
        "/etc": mount(tmp_path, "/etc", readonly=True),
    }
    for place, asked in mounts_asked.items():
        plan = bench.artifact(wasm.prints_file(3, "hosts"), mounts=[asked])
        assert (await bench.finish(plan)).code == 0, place
        assert bench.text(plan) == ["of the request"]


# Single files as root: bind mounts, in the private namespace that scripts/test makes.


@pytest.mark.root
async def test_a_file_mount_of_an_artifact_is_the_file_itself(mounting_bench: WasmBench, tmp_path: Path) -> None:
    bench = mounting_bench
    (tmp_path / "log").touch()
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    mounted = [mount(tmp_path / "log", "/dev/termination-log"), mount(tmp_path / "hosts", "/etc/hosts", readonly=True)]
    plans = {
        "written": bench.artifact(wasm.writes_file(3, "termination-log", "bye"), mounts=mounted),
        "read": bench.artifact(wasm.prints_file(4, "hosts"), mounts=mounted),
        "not written": bench.artifact(wasm.writes_file(4, "hosts", "x"), mounts=mounted),
        "nothing else": bench.artifact(wasm.writes_file(3, "other", "x"), mounts=mounted),
    }
    codes = {name: (await bench.finish(plan)).code for name, plan in plans.items()}
    assert (codes["written"], codes["read"]) == (0, 0)
    assert codes["not written"] != 0
    assert codes["nothing else"] != 0
    assert (tmp_path / "log").read_text() == "bye"
    assert bench.text(plans["read"]) == ["127.0.0.1 localhost"]
    for plan in plans.values():
        await bench.handler.delete(plan.id, "")
        assert list(plan.bundle.iterdir()) == []
    assert not [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(bench.layout.state)]


@pytest.mark.root
@pytest.mark.parametrize("readonly", [False, True])
async def test_a_file_mount_over_an_image(
    mounting_bench: WasmBench, rootfs: Path, tmp_path: Path, readonly: bool
) -> None:
    bench = mounting_bench
    (tmp_path / "log").touch()
    (rootfs / "var").symlink_to("srv")
    (rootfs / "bin/app").write_bytes(wasm.assemble(wasm.writes_file(3, "var/new/termination-log", "bye")))
    (rootfs / "bin/other").write_bytes(wasm.assemble(wasm.writes_file(3, "etc/other", "x")))
    log = mount(tmp_path / "log", "/var/new/termination-log")

    def container() -> ContainerPlan:
        return bench.artifact(wasm.HELLO, linux=secured(readonly_rootfs=readonly), mounts=[log])

    app = with_rootfs(container(), rootfs, "app")
    assert (await bench.finish(app)).code == 0
    assert (tmp_path / "log").read_text() == "bye"
    assert (rootfs / "srv/new/termination-log").read_text() == ""
    other = with_rootfs(container(), rootfs, "other")
    assert ((await bench.finish(other)).code == 0) is not readonly
    await bench.restart()
    for plan in (app, other):
        await bench.handler.delete(plan.id, "")  # by id alone, by a daemon that knows nothing
    assert not [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(bench.layout.state)]


@pytest.mark.root
@pytest.mark.parametrize("readonly", [False, True])
async def test_a_file_inside_another_mount(mounting_bench: WasmBench, tmp_path: Path, readonly: bool) -> None:
    bench = mounting_bench
    volume, outside = tmp_path / "volume", tmp_path / "outside"
    (volume / "sub").mkdir(parents=True)
    outside.mkdir()
    (volume / "sub" / "settings").write_text("of the volume\n")
    (volume / "other").symlink_to(outside)
    (tmp_path / "settings").write_text("of the file\n")
    (tmp_path / "log").touch()
    mounted = [
        mount(tmp_path / "settings", "/data/sub/settings", readonly=True),
        mount(volume, "/data", readonly=readonly),
    ]
    plan = bench.artifact(wasm.prints_file(3, "sub/settings"), mounts=mounted)
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == ["of the file"]
    assert (volume / "sub" / "settings").read_text() == "of the volume\n"
    plan = bench.artifact(wasm.writes_file(3, "made", "x"), mounts=mounted)
    assert ((await bench.finish(plan)).code == 0) is not readonly
    # One that is not there is made, as by runc; not through a link that leads out, and not in a read-only mount.
    for place, possible in (("/data/new/log", not readonly), ("/data/other/log", False)):
        plan = bench.artifact(
            wasm.writes_file(3, place.removeprefix("/data/"), "bye"),
            mounts=[mount(volume, "/data", readonly=readonly), mount(tmp_path / "log", place)],
        )
        if possible:
            assert (await bench.finish(plan)).code == 0
            assert (tmp_path / "log").read_text() == "bye"
        else:
            with pytest.raises(FailedPrecondition, match="no file can be made there"):
                await bench.handler.create(plan)
    assert list(outside.iterdir()) == []
    await bench.restart()
    for plan in bench.plans:
        await bench.handler.delete(plan.id, "")
    assert not [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(bench.layout.state)]
    assert not [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(volume)]
    assert (volume / "sub" / "settings").read_text() == "of the volume\n"


@pytest.mark.root
async def test_mount_options_are_those_of_the_mount(mounting_bench: WasmBench, tmp_path: Path) -> None:
    bench = mounting_bench
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "file").write_text("content\n")
    asked = mount(volume, "/data")
    asked.mount_options.extend(["nodev", "noexec", "nosuid", "noatime", "nodiratime"])
    plan = bench.artifact(wasm.prints_file(3, "file"), mounts=[asked])
    await bench.handler.create(plan)
    (found,) = (entry for entry in mounts.mountinfo() if entry.target.is_relative_to(bench.layout.state))
    assert {"nodev", "noexec", "nosuid", "noatime", "nodiratime"} <= set(found.options)
    await bench.handler.start(plan.id)
    await bench.end_of(plan)
    assert bench.text(plan) == ["content"]
    asked.mount_options.append("suid")
    with pytest.raises(InvalidArgument, match="mount_options 'suid' of /data is not supported"):
        await bench.handler.create(bench.artifact(wasm.HELLO, mounts=[asked]))
