"""Files below a root that somebody else controls, atomic writes, removal, locks; none of it needs root."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cri_shim.kernel import caps, fs, mounts, notify
from cri_shim.model.errors import InvalidArgument


def test_atomic_write_replaces_with_exactly_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    before = os.umask(0o077)
    try:
        fs.atomic_write(path, b"new", 0o666, sync=True)
    finally:
        os.umask(before)
    assert (path.read_bytes(), path.stat().st_mode & 0o7777) == (b"new", 0o666)
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_replaces_a_symlink_and_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("safe")
    (tmp_path / "link").symlink_to("victim")
    fs.atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "victim").read_text() == "safe"


def test_failed_atomic_write_leaves_the_old_file_and_no_scratch(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        fs.atomic_write(tmp_path / "taken", b"new")
    assert os.listdir(tmp_path) == ["taken"]


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "out").symlink_to(outside)
    (tree / "up").symlink_to("..")
    os.mkfifo(tree / "a" / "b" / "fifo")
    fs.remove_tree(tree)
    fs.remove_tree(tree)
    (tmp_path / "link").symlink_to(outside)
    fs.remove_tree(tmp_path / "link")
    assert os.listdir(tmp_path) == ["outside"]
    assert (outside / "kept").exists()


def test_remove_tree_of_any_depth(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    here = os.open(tree, os.O_RDONLY)
    for _ in range(3000):  # far beyond PATH_MAX, the recursion limit and the limit of descriptors
        os.mkdir("d" * 50, dir_fd=here)
        below = os.open("d" * 50, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert fs.usage(tree)[1] > 10
    fs.remove_tree(tree)
    assert not tree.exists()


def test_usage_counts_blocks_and_inodes_and_hard_links_once(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "file").write_bytes(bytes(1 << 20))
    (tree / "sub" / "same").hardlink_to(tree / "file")
    (tree / "link").symlink_to("/")
    total, inodes = fs.usage(tree)
    assert inodes == 4
    assert 1 << 20 <= total < (1 << 20) + (64 << 10)
    assert fs.usage(tmp_path / "gone") == (0, 0)


def test_read_in_root_stays_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "passwd").write_text("inside")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "upwards").symlink_to("../../../../etc/passwd")
    (root / "magic").symlink_to("/proc/self/root/etc/passwd")
    for name in ("/etc/passwd", "etc/passwd", "/absolute", "/upwards", "../../etc/passwd"):
        assert fs.read_in_root(root, name, 100) == b"inside"
    for name in ("/etc/shadow", "/etc/passwd/x", "/magic"):
        assert fs.read_in_root(root, name, 100) is None


def test_read_in_root_refuses_what_is_no_plain_file_and_what_is_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").write_bytes(bytes(11))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for name in ("fifo", "directory", "socket"):
        with pytest.raises(InvalidArgument, match=f"^/{name} in the image is not a regular file$"):
            fs.read_in_root(tmp_path, f"/{name}", 10)
    with pytest.raises(InvalidArgument, match="larger than 10 bytes"):
        fs.read_in_root(tmp_path, "/large", 10)
    with pytest.raises(InvalidArgument, match=r"^/loop in the image: Too many levels of symbolic links$"):
        fs.read_in_root(tmp_path, "/loop", 10)


def test_lock_has_one_holder_and_ends_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = "import sys; from pathlib import Path; from cri_shim.kernel.fs import lock_exclusive;"
    program += "print(lock_exclusive(Path(sys.argv[1])) is not None)"
    fd = fs.lock_exclusive(lock)
    assert fd is not None
    command = [sys.executable, "-c", program, str(lock)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"False\n"
    os.close(fd)
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"True\n"


@pytest.mark.parametrize("abstract", [False, True])
def test_notify_reaches_the_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"\0cri-shim-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        assert notify.notify("READY=1", "STATUS=serving")
        assert manager.recv(100) == b"READY=1\nSTATUS=serving"


def test_notify_without_or_with_a_dead_manager_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not notify.notify("READY=1")


def test_watchdog_interval_is_half_of_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert notify.watchdog_interval() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_interval() is None


def test_mount_table_escapes_and_optional_fields() -> None:
    line = rb"36 35 98:0 /mnt\0401 /mnt\134two\011 rw,noatime shared:5 master:1 - ext3 /dev/root\043 rw,errors=continue"
    (entry,) = mounts.parse_mountinfo(line + b"\n")
    assert entry == mounts.MountEntry(
        mount_id=36,
        parent_id=35,
        device="98:0",
        root="/mnt 1",
        target=Path("/mnt\\two\t"),
        options=("rw", "noatime"),
        propagation=("shared:5", "master:1"),
        fstype="ext3",
        source="/dev/root#",
        super_options=("rw", "errors=continue"),
    )


def test_capabilities_are_named_by_their_bits() -> None:
    status = Path("/proc/self/status").read_text()
    mask = int(status.split("CapEff:")[1].split()[0], 16)
    bits = {"CHOWN": 0, "NET_ADMIN": 12, "SYS_ADMIN": 21, "SYS_RESOURCE": 24, "MKNOD": 27, "CHECKPOINT_RESTORE": 40}
    assert {name for name in bits if name in caps.effective()} == {n for n, bit in bits.items() if mask >> bit & 1}
    assert caps.can_lower_oom_score_adj() is bool(mask >> 24 & 1)
