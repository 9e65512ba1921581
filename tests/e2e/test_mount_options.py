"""`Mount.mount_options`: in force in the mount table of the container, with every kind of mount that there is."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from cri_shim.kernel import mounts
from cri_shim.pb import api_pb2 as pb
from tests.conftest import MakeDaemon
from tests.e2e.conftest import Lab
from tests.support import images
from tests.support.expect import refused

pytestmark = [pytest.mark.root, pytest.mark.parametrize("handler", ["runc", "crun"])]

RESTRICTING = ["noexec", "nosuid", "nodev"]
SHOW = """awk '$5 ~ "^/mount" { split($0, half, " - "); print $5, $6, $7 }' /proc/self/mountinfo"""


def asked(source: Path, options: list[str], target: str = "/mount", **fields: object) -> pb.Mount:
    return pb.Mount(host_path=str(source), container_path=target, mount_options=options, **fields)  # type: ignore[arg-type]


def seen(lines: list[str]) -> dict[str, tuple[set[str], str]]:
    """Options and propagation by mount point, from the lines of SHOW."""
    return {target: (set(options.split(",")), tag) for target, options, tag in (line.split() for line in lines)}


@pytest.mark.parametrize("option", [*RESTRICTING, "noatime", "nodiratime", "relatime", "strictatime"])
def test_one_option(shared_lab: Lab, handler: str, option: str, tmp_path: Path) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    lines = lab.say(pod, SHOW, lambda config: config.mounts.append(asked(tmp_path, [option])))
    options, _ = seen(lines)["/mount"]
    # The kernel's word for strictatime is none at all.
    assert option in options if option != "strictatime" else not options & {"noatime", "relatime"}
    assert not set(RESTRICTING) & options - {option}


def test_noexec_and_nosuid_hold(shared_lab: Lab, handler: str, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("#!/bin/sh\necho runs\n")
    (tmp_path / "run").chmod(0o755)
    lab, pod = shared_lab, shared_lab.pod(handler)
    script = "/plain/run; /mount/run 2>&1; echo $?"

    def two(config: pb.ContainerConfig) -> None:
        config.mounts.extend([asked(tmp_path, [], "/plain"), asked(tmp_path, ["noexec"])])

    plain, refusal, code = lab.say(pod, script, two)
    assert (plain, code) == ("runs", "126")
    assert "Permission denied" in refusal


@pytest.mark.parametrize("readonly", [False, True])
def test_with_read_only_and_mounts_below(shared_lab: Lab, handler: str, readonly: bool, tmp_path: Path) -> None:
    """As with readonly: of the mount itself; what is mounted below keeps its own options."""
    below = tmp_path / "below"
    below.mkdir()
    mounts.bind(below, below)
    lab, pod = shared_lab, shared_lab.pod(handler)
    try:
        mount = asked(tmp_path, [*RESTRICTING, "noatime"], readonly=readonly)
        found = seen(lab.say(pod, SHOW, lambda config: config.mounts.append(mount)))
    finally:
        mounts.unmount(below)
    assert {*RESTRICTING, "noatime", "ro" if readonly else "rw"} <= found["/mount"][0]
    assert "noexec" not in found["/mount/below"][0]


def test_recursive_read_only(shared_lab: Lab, handler: str, tmp_path: Path) -> None:
    features = {one.name: one.features for one in shared_lab.cri.runtime.Status(pb.StatusRequest()).runtime_handlers}
    lab, pod = shared_lab, shared_lab.pod(handler)
    below = tmp_path / "below"
    below.mkdir()
    mounts.bind(below, below)
    mount = asked(tmp_path, ["noexec"], readonly=True, recursive_read_only=True)
    try:
        if not features[handler].recursive_read_only_mounts:
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "RROUnsupported"):
                lab.say(pod, SHOW, lambda config: config.mounts.append(mount))
            return
        found = seen(lab.say(pod, SHOW, lambda config: config.mounts.append(mount)))
    finally:
        mounts.unmount(below)
    assert {"noexec", "ro"} <= found["/mount"][0]
    assert "ro" in found["/mount/below"][0]


@pytest.mark.parametrize(
    ("propagation", "tag"),
    [(pb.PROPAGATION_HOST_TO_CONTAINER, "master:"), (pb.PROPAGATION_BIDIRECTIONAL, "shared:")],
)
def test_with_propagation(
    make_daemon: MakeDaemon,
    handler: str,
    propagation: pb.MountPropagation.ValueType,
    tag: str,
    registry: images.Registry,
    busybox: str,
) -> None:
    daemon = make_daemon(shared_root=True)
    shared = daemon.base / "shared"
    shared.mkdir()
    with daemon.client() as cri:
        cri.pull(busybox)
        lab = Lab(daemon, cri, busybox, "")
        mount = asked(shared, RESTRICTING, propagation=propagation)
        found = seen(lab.say(lab.pod(handler), SHOW, lambda config: config.mounts.append(mount)))
    assert set(RESTRICTING) <= found["/mount"][0]
    assert found["/mount"][1].startswith(tag)


def test_on_an_image_volume(shared_lab: Lab, handler: str) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    mount = pb.Mount(
        image=pb.ImageSpec(image=lab.busybox), container_path="/mount", readonly=True, mount_options=["noexec"]
    )
    found = seen(lab.say(pod, SHOW, lambda config: config.mounts.append(mount)))
    assert {"noexec", "ro"} <= found["/mount"][0]


def test_what_cannot_be_asked_for(shared_lab: Lab, handler: str, tmp_path: Path) -> None:
    lab, pod = shared_lab, shared_lab.pod(handler)
    assert lab.cri.runtime.Status(pb.StatusRequest()).features.mount_options
    for options, words in (
        (["exec"], "mount_options 'exec' of /mount"),
        (["ro"], "mount_options 'ro' of /mount is not supported; use readonly"),
        (["rshared"], "mount_options 'rshared' of /mount"),
        (["noatime", "strictatime"], "noatime and strictatime of /mount exclude each other"),
    ):
        config = lab.shell("true")
        config.mounts.append(asked(tmp_path, options))
        with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
            lab.cri.create(pod, config)
