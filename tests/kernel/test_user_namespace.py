"""Real user namespaces: made by a child of the zygote, pinned, and what is mapped by one."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cri_shim.adapters.user_namespaces import UserNamespaces
from cri_shim.adapters.zygote import TaskError, Zygote
from cri_shim.kernel import mounts, namespaces
from cri_shim.model.layout import Layout

pytestmark = pytest.mark.root

FIRST = 400_000
NS_GET_USERNS = 0xB701  # ioctl_nsfs(2)


@pytest.fixture
async def zygote() -> AsyncIterator[Zygote]:
    made = Zygote()
    yield made
    await made.aclose()


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "ns"
    directory.mkdir()
    yield directory
    mounts.unmount_tree(tmp_path.resolve())


async def pin(zygote: Zygote, directory: Path, **wanted: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "directory": str(directory),
        "uids": (FIRST, 100),
        "gids": (FIRST + 1, 100),
        "kinds": ["net", "ipc", "uts"],
        "hostname": "pod",
        "sysctls": {},
    }
    return await zygote.run("cri_shim.kernel.user_namespace:pin", {**arguments, **wanted}, timeout=60)


def owner_of(namespace: Path) -> int:
    """The inode of the user namespace that a namespace belongs to."""
    with namespace.open("rb") as file:
        fd = fcntl.ioctl(file, NS_GET_USERNS)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def processes_in(namespace: Path) -> list[str]:
    """The pids of those in a user namespace."""
    wanted, found = namespace.stat().st_ino, []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if (entry / "ns/user").stat().st_ino == wanted:
                found.append(entry.name)
    return found


async def test_the_others_are_made_inside_and_the_process_is_gone(zygote: Zygote, pins: Path) -> None:
    assert await pin(zygote, pins) == {}
    assert {entry.name for entry in pins.iterdir()} == {"user", "net", "ipc", "uts"}
    assert {owner_of(pins / kind) for kind in ("net", "ipc", "uts")} == {(pins / "user").stat().st_ino}
    assert (pins / "user").stat().st_ino != Path("/proc/self/ns/user").stat().st_ino
    assert processes_in(pins / "user") == []
    namespaces.unpin(pins)
    assert not pins.exists()


async def test_a_refused_sysctl_is_told_and_nothing_is_bound(zygote: Zygote, pins: Path) -> None:
    said = await pin(zygote, pins, sysctls={"net.ipv4.ping_group_range": "0 100"})
    assert "net.ipv4.ping_group_range" in str(said["invalid"])
    assert list(pins.iterdir()) == []


async def test_errors_come_out(zygote: Zygote, pins: Path) -> None:
    with pytest.raises(TaskError) as caught:
        await pin(zygote, pins, hostname="h" * 65)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(TaskError) as caught:
        await pin(zygote, pins / "missing")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(TaskError) as caught:
        await pin(zygote, pins, uids=(2**32 - 1, 2))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("append", [True, False])
async def test_layers_appear_mapped_in_the_overlay_alone(
    zygote: Zygote, pins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, append: bool
) -> None:
    if append and not mounts._has_lowerdir_append():
        pytest.skip("this kernel has no lowerdir+")
    monkeypatch.setattr(mounts, "_has_lowerdir_append", lambda: append)
    await pin(zygote, pins)
    layers, upper, work, target = (tmp_path / name for name in ("layers", "upper", "work", "target"))
    for path in (layers / "1", layers / "2", upper, work, target):
        path.mkdir(parents=True)
    for number, (uid, gid) in (("1", (0, 0)), ("2", (7, 8))):
        (layers / number / f"of-{number}").touch()
        os.chown(layers / number / f"of-{number}", uid, gid)
    (layers / "1" / "unmapped").touch()
    os.chown(layers / "1" / "unmapped", 100, 100)
    lowers = [layers / "2", layers / "1"]
    mounts.idmapped_overlay(target, lowers, upper, work, base=layers, user_namespace=pins / "user")
    seen = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in target.iterdir()}
    assert seen == {"of-1": (FIRST, FIRST + 1), "of-2": (FIRST + 7, FIRST + 9), "unmapped": (65534, 65534)}
    with (target / "of-2").open("a") as file:
        file.write("x")
    assert (upper / "of-2").stat().st_uid == FIRST + 7
    assert (layers / "2" / "of-2").stat().st_uid == 7
    assert not mounts.is_mount_point(layers)
    assert len([entry for entry in mounts.mountinfo() if entry.target.is_relative_to(tmp_path / "target")]) == 1


async def test_a_file_system_without_idmapped_mounts(zygote: Zygote, pins: Path, tmp_path: Path) -> None:
    await pin(zygote, pins)
    with pytest.raises(OSError, match="mount_setattr") as caught:
        mounts.idmapped_overlay(
            tmp_path,
            [Path("/proc/sys"), Path("/proc/net")],
            None,
            None,
            base=Path("/proc"),
            user_namespace=pins / "user",
        )
    assert caught.value.errno == errno.EINVAL
    assert not mounts.is_mount_point(tmp_path)


async def test_what_the_node_lacks_is_found_out_by_trying(zygote: Zygote, tmp_path: Path) -> None:
    layout = Layout(root=tmp_path, state=tmp_path)
    layout.layers.mkdir()
    assert await UserNamespaces(layout, zygote).missing() == ""
    mounts.bind(Path("/proc"), layout.layers)
    try:
        assert "has no idmapped mounts" in await UserNamespaces(layout, zygote).missing()
    finally:
        mounts.unmount(layout.layers)
    layout.layers.rmdir()
    assert "open_tree: No such file" in await UserNamespaces(layout, zygote).missing()
    assert zygote.pid is None


async def test_a_trial_that_is_given_up_ends_and_the_next_one_answers(zygote: Zygote, tmp_path: Path) -> None:
    layout = Layout(root=tmp_path, state=tmp_path)
    layout.layers.mkdir()
    asked = UserNamespaces(layout, zygote)
    for steps in range(0, 12, 3):
        first, second = asyncio.ensure_future(asked.missing()), asyncio.ensure_future(asked.missing())
        for _ in range(steps):
            await asyncio.sleep(0)
        first.cancel()
        assert await second == ""
        with pytest.raises(asyncio.CancelledError):
            await first
        asked = UserNamespaces(layout, zygote)
