"""Copies of trees: everything that a file is, and nothing that is outside of the tree."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.kernel.copy import copy_contents

pytestmark = pytest.mark.root


def put(path: Path, content: str, mode: int, owner: int) -> None:
    path.write_text(content)
    os.chown(path, owner, owner + 1)
    path.chmod(mode)
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "sub" / "empty").mkdir(parents=True)
    put(top / "sub" / "file", "content", 0o4751, 1000)
    os.link(top / "sub" / "file", top / "again")
    (top / "link").symlink_to("/etc/passwd")
    (top / "broken").symlink_to("nowhere")
    os.lchown(top / "broken", 7, 8)
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.setxattr(top / "sub" / "file", "user.note", b"x")
    os.chown(top / "sub", 3, 4)
    (top / "sub").chmod(0o1777)
    (top / "sub" / "empty").chmod(0)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(top / "socket"))
    os.chown(top, 5, 6)
    top.chmod(0o2750)
    os.utime(top / "sub", ns=(3_000_000_003, 4_000_000_004))
    return top


def looks(top: Path) -> Iterator[tuple[object, ...]]:
    """What there is, file by file; the tree's own inode numbers as small ones."""
    for path in sorted([top, *top.rglob("*")]):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = (path.read_text(), os.listxattr(path))
        elif stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        times = None if stat.S_ISLNK(status.st_mode) else status.st_mtime_ns
        yield (
            path.relative_to(top), status.st_mode, status.st_uid, status.st_gid, status.st_rdev, status.st_nlink,
            times, content,
        )  # fmt: skip


def test_a_copy_is_alike(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_contents(tree, copy)
    assert list(looks(copy)) == [look for look in looks(tree) if look[0] != Path("socket")]
    assert (copy / "again").samefile(copy / "sub" / "file")
    assert not (copy / "again").samefile(tree / "again")


def test_an_empty_directory(tmp_path: Path) -> None:
    source, copy = tmp_path / "a", tmp_path / "b"
    source.mkdir(mode=0o711)
    copy.mkdir()
    copy_contents(source, copy)
    assert list(copy.iterdir()) == []
    assert stat.S_IMODE(copy.stat().st_mode) == 0o711


def test_a_file_that_is_in_the_way_is_named(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "fifo").touch()
    with pytest.raises(FileExistsError) as caught:
        copy_contents(tree, copy)
    assert "fifo" in str(caught.value)
