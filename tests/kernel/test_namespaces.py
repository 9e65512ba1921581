"""Real namespaces: pinned, entered, dropped."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.kernel import libc, mounts, namespaces, process, threads
from cri_shim.model.errors import FailedPrecondition, InvalidArgument

pytestmark = pytest.mark.root


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "ns"
    yield directory
    namespaces.unpin(directory)
    mounts.unmount_tree(tmp_path.resolve())


def own(kind: str) -> str:
    return os.readlink(f"/proc/thread-self/ns/{kind}")


def identity(pin: Path) -> str:
    kind = pin.name
    return f"{kind}:[{pin.stat().st_ino}]"


def pin(directory: Path, **wanted: object) -> None:
    arguments = {"net": True, "ipc": True, "uts": True, "hostname": "pod", "sysctls": {}} | wanted
    namespaces.pin_namespaces(directory, **arguments)  # type: ignore[arg-type]


def in_uts_and_ipc(directory: Path, name: str) -> str:
    """A value below /proc/sys as seen from inside the pinned namespaces."""

    def read() -> str:
        for kind, flag in (("uts", libc.CLONE_NEWUTS), ("ipc", libc.CLONE_NEWIPC), ("net", libc.CLONE_NEWNET)):
            with (directory / kind).open("rb") as file:
                libc.setns(file.fileno(), flag)
        return Path("/proc/sys", name).read_text().strip()

    return threads.call_in_new_thread(read)


def test_new_namespaces_are_pinned_and_the_daemon_stays_in_its_own(pins: Path) -> None:
    before = {kind: own(kind) for kind in ("net", "ipc", "uts", "mnt")}
    pin(pins)
    assert {identity(pins / kind) for kind in ("net", "ipc", "uts")}.isdisjoint(before.values())
    assert {kind: own(kind) for kind in before} == before
    assert in_uts_and_ipc(pins, "kernel/hostname") == "pod"
    assert socket.gethostname() != "pod"


def test_only_wanted_kinds_are_made(pins: Path) -> None:
    pin(pins, net=False, uts=False)
    assert [entry.name for entry in pins.iterdir()] == ["ipc"]


def test_loopback_is_up_and_reachable_inside(pins: Path) -> None:
    pin(pins)

    def talk() -> bytes:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
            client.sendall(b"hello")
            with server.accept()[0] as peer:
                return peer.recv(5)

    assert namespaces.run_in_netns(pins / "net", talk) == b"hello"
    assert namespaces.run_in_netns(pins / "net", socket.if_nameindex) == [(1, "lo")]


def test_sysctls_are_written_inside_and_not_outside(pins: Path) -> None:
    names = {"net/ipv4/ip_unprivileged_port_start": "7", "kernel/shm_rmid_forced": "1", "fs/mqueue/msg_max": "13"}
    before = {name: Path("/proc/sys", name).read_text() for name in names}
    pin(pins, sysctls={name.replace("/", "."): value for name, value in names.items()})
    assert {name: in_uts_and_ipc(pins, name) for name in names} == names
    assert {name: Path("/proc/sys", name).read_text() for name in names} == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vm.swappiness", "is not namespaced: it would change the whole node"),
        ("kernel.core_pattern", "is not namespaced"),
        ("net/../kernel/core_pattern", "is not namespaced"),
        ("net.//.kernel.core_pattern", "is not namespaced"),
        ("/proc/sys/net", "is not namespaced"),
        ("", "is not namespaced"),
        ("net.ipv4.no_such_thing", "does not exist on this node"),
        ("net.ipv4.ip_unprivileged_port_start", "cannot be set to 'abc'"),
    ],
)
def test_refused_sysctl_is_named_and_leaves_nothing(pins: Path, name: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason) as caught:
        pin(pins, sysctls={name: "abc"})
    assert repr(name) in str(caught.value)
    assert not pins.exists()


def test_sysctl_of_a_shared_namespace_is_refused(pins: Path) -> None:
    with pytest.raises(InvalidArgument, match="needs a net namespace of the pod's own"):
        pin(pins, net=False, sysctls={"net.ipv4.ip_forward": "1"})


def test_over_long_hostname_fails_and_leaves_nothing(pins: Path) -> None:
    with pytest.raises(OSError, match="sethostname"):
        pin(pins, hostname="h" * 65)
    assert not pins.exists()
    assert not [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(pins)]


def test_a_failure_leaves_the_pins_of_other_kinds(pins: Path) -> None:
    pin(pins, net=False, ipc=False)
    with pytest.raises(InvalidArgument, match="does not exist on this node"):
        pin(pins, net=False, uts=False, sysctls={"kernel.shm_no_such_thing": "1"})
    assert [entry.name for entry in pins.iterdir()] == ["uts"]
    assert mounts.is_mount_point(pins / "uts")


def test_unpin_is_idempotent_and_ends_the_namespace(pins: Path) -> None:
    pin(pins)
    namespaces.unpin(pins)
    namespaces.unpin(pins)
    assert not pins.exists()
    with pytest.raises(FailedPrecondition, match="is gone; the node was restarted"):
        namespaces.run_in_netns(pins / "net", list)


def test_errors_of_the_function_come_out(pins: Path) -> None:
    pin(pins)
    with pytest.raises(ZeroDivisionError):
        namespaces.run_in_netns(pins / "net", lambda: 1 // 0)


def test_thousand_pins_leave_nothing(pins: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        pin(pins)
        namespaces.unpin(pins)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert not [entry for entry in mounts.mountinfo() if entry.fstype == "nsfs" and pins in entry.target.parents]


UNIFIED = Path("/sys/fs/cgroup/unified")
hybrid = pytest.mark.skipif(not (UNIFIED / "cgroup.procs").exists(), reason="no hybrid cgroups here")


@hybrid
async def test_child_in_a_fresh_namespace_has_an_empty_place_of_the_unified_hierarchy(tmp_path: Path) -> None:
    enter = namespaces.fresh_mount_namespace_without([UNIFIED])
    done = await process.run(["cat", "/proc/self/mountinfo"], timeout=60, enter=enter)
    inside = mounts.parse_mountinfo(done.stdout)
    assert {entry.fstype for entry in inside if entry.target == UNIFIED} == {"tmpfs"}
    assert {entry.fstype for entry in mounts.mountinfo() if entry.target == UNIFIED} == {"cgroup2"}
    assert tmp_path.exists()


@hybrid
async def test_pinned_mount_namespace_is_made_once_and_entered(tmp_path: Path) -> None:
    pin_file = tmp_path.resolve() / "mntns" / "crun"
    namespaces.pin_mount_namespace(pin_file, [UNIFIED])
    first = pin_file.stat().st_ino
    namespaces.pin_mount_namespace(pin_file, [UNIFIED])
    assert pin_file.stat().st_ino == first
    assert mounts.propagation_of(pin_file.parent) == ()
    try:
        enter = namespaces.enter_mount_namespace(pin_file)
        done = await process.run(["readlink", "/proc/self/ns/mnt"], timeout=60, enter=enter)
        assert done.stdout.decode().strip() == f"mnt:[{first}]"
        assert (await process.run(["ls", UNIFIED / "cgroup.procs"], timeout=60, enter=enter)).returncode != 0
        assert own("mnt") != f"mnt:[{first}]"
    finally:
        mounts.unmount_tree(pin_file.parent)


@hybrid
async def test_pinned_mount_namespace_sees_later_mounts_of_a_shared_parent(tmp_path: Path) -> None:
    shared = tmp_path.resolve() / "shared"
    shared.mkdir()
    mounts.make_shared(shared)
    pin_file = tmp_path.resolve() / "mntns" / "crun"
    try:
        namespaces.pin_mount_namespace(pin_file, [UNIFIED])
        (shared / "later").mkdir()
        mounts.tmpfs(shared / "later", size=1 << 20, mode=0o755)
        (shared / "later" / "file").touch()
        enter = namespaces.enter_mount_namespace(pin_file)
        assert (await process.run(["ls", shared / "later"], timeout=60, enter=enter)).stdout == b"file\n"
    finally:
        mounts.unmount_tree(tmp_path.resolve())


async def test_missing_mount_namespace_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=f"namespace {tmp_path}/gone is gone"):
        await process.run(["true"], timeout=60, enter=namespaces.enter_mount_namespace(tmp_path / "gone"))
