"""Labels of files, on the real attribute; and what selinuxfs says, for which files stand where SELinux is off."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cri_shim.kernel import mounts, selinux

pytestmark = pytest.mark.root

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"
OFF = not selinux.is_enabled()


def label_of(path: Path) -> str:
    return os.getxattr(path, "security.selinux", follow_symlinks=False).decode().rstrip("\0")


def test_a_tree_is_relabeled_and_its_links_are_not_followed(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    (tree / "deep/er").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").touch()
    for name in ("file", "deep/file"):
        (tree / name).touch()
    (tree / "deep/link").symlink_to(outside)
    (tree / "dangling").symlink_to("nowhere")
    os.mkfifo(tree / "fifo")
    (tree / "hard").hardlink_to(tree / "file")
    selinux.relabel(tree, LABEL)
    for name in ("", "deep", "deep/er", "file", "deep/file", "deep/link", "dangling", "fifo", "hard"):
        assert label_of(tree / name) == LABEL, name
    if OFF:
        for path in (outside, outside / "file"):
            assert "security.selinux" not in os.listxattr(path)


def test_one_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    selinux.relabel(file, LABEL)
    assert label_of(file) == LABEL


def test_what_has_the_label_is_not_written_to(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    selinux.relabel(file, LABEL)
    before = file.stat().st_ctime_ns
    selinux.relabel(file, LABEL)
    assert file.stat().st_ctime_ns == before


def test_a_file_system_without_labels_is_left_as_it_is(tmp_path: Path) -> None:
    selinux.relabel(Path("/proc/self/fdinfo"), LABEL)
    (tmp_path / "ro").mkdir()
    mounts.bind(tmp_path / "ro", tmp_path / "ro", readonly=True)
    try:
        selinux.relabel(tmp_path / "ro", LABEL)
    finally:
        mounts.unmount(tmp_path / "ro")


def test_the_contexts_of_the_policy_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "_CONFIG", tmp_path)
    assert not selinux.container_contexts()
    (tmp_path / "mine/contexts").mkdir(parents=True)
    (tmp_path / "mine/contexts/lxc_contexts").write_text("process = x\n")
    assert not selinux.container_contexts()
    (tmp_path / "config").write_text("# SELINUXTYPE=other\nSELINUX=permissive\nSELINUXTYPE=mine\n")
    assert selinux.container_contexts() == "process = x\n"


@pytest.mark.skipif(not OFF, reason="SELinux is on")
def test_without_selinux_no_label_is_valid() -> None:
    assert not selinux.is_valid(LABEL)
