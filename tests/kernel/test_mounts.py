"""Real mounts in the private mount namespace of the run."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.kernel import fs, libc, mounts, threads

pytestmark = pytest.mark.root


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A directory on a tmpfs of its own; nothing below it survives the test."""
    place = tmp_path.resolve() / "work"
    place.mkdir()
    mounts.tmpfs(place, size=64 << 20, mode=0o755)
    yield place
    mounts.unmount_tree(place)
    assert [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(place)] == []


def directory(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def entry_at(target: Path) -> mounts.MountEntry:
    return [entry for entry in mounts.mountinfo() if entry.target == target][-1]


def test_tmpfs_has_size_mode_and_safe_flags(work: Path) -> None:
    entry = entry_at(work)
    assert (entry.fstype, work.stat().st_mode & 0o7777) == ("tmpfs", 0o755)
    assert {"nosuid", "nodev", "noexec"} <= set(entry.options)
    assert os.statvfs(work).f_blocks * os.statvfs(work).f_frsize == 64 << 20


def test_readonly_bind_refuses_writes_and_leaves_the_source_writable(work: Path) -> None:
    source, target = directory(work / "source", file="x"), directory(work / "target")
    mounts.bind(source, target, readonly=True)
    with pytest.raises(OSError, match="Read-only") as caught:
        (target / "new").touch()
    assert caught.value.errno == errno.EROFS
    (source / "new").touch()
    assert (target / "new").exists()
    assert {"nosuid", "nodev"} <= set(entry_at(target).options)


def test_recursive_readonly_bind_covers_mounts_below(work: Path) -> None:
    source, target = directory(work / "source"), directory(work / "target")
    mounts.tmpfs(directory(source / "inner"), size=1 << 20, mode=0o755)
    mounts.bind(source, target, readonly=True, recursive=True)
    with pytest.raises(OSError, match="Read-only"):
        (target / "inner" / "new").touch()


def test_missing_source_is_named(work: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mount: .*target"):
        mounts.bind(work / "nowhere", directory(work / "target"))


def test_bound_file_is_a_mount_point_and_plain_things_are_not(work: Path) -> None:
    source, pin = work / "a file", work / "a pin"
    source.write_text("x")
    pin.touch()
    assert not mounts.is_mount_point(pin)
    mounts.bind(source, pin)
    assert mounts.is_mount_point(pin)
    assert entry_at(pin).target == pin  # the space is an octal escape in the table
    assert mounts.is_mount_point(Path("/"))
    assert not mounts.is_mount_point(work / "nowhere")


def test_unmount_of_nothing_is_success(work: Path) -> None:
    mounts.unmount(work / "nowhere")
    mounts.unmount(directory(work / "plain"))
    mounts.unmount(directory(work / "plain2"), detach=False)


def test_unmount_tree_takes_stacked_and_nested_mounts_only_at_the_prefix(work: Path) -> None:
    one, neighbour = directory(work / "one"), directory(work / "one-more")
    for target in (one, one, neighbour):
        mounts.tmpfs(target, size=1 << 20, mode=0o700)
    mounts.tmpfs(directory(one / "deep" / "er"), size=1 << 20, mode=0o700)
    mounts.unmount_tree(one)
    assert not mounts.is_mount_point(one)
    assert mounts.is_mount_point(neighbour)


def test_propagation(work: Path) -> None:
    plain = directory(work / "plain")
    mounts.make_shared(plain)
    assert [tag.split(":")[0] for tag in mounts.propagation_of(plain)] == ["shared"]
    mounts.make_shared(plain)
    assert len([entry for entry in mounts.mountinfo() if entry.target == plain]) == 1
    mounts.make_private(plain)
    assert mounts.propagation_of(plain) == ()


@pytest.mark.parametrize("append", [True, False], ids=["fsconfig", "mount"])
class TestOverlay:
    """Both ways to mount an overlay."""

    @pytest.fixture(autouse=True)
    def way(self, append: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if append and not mounts._has_lowerdir_append():
            pytest.skip("this kernel has no lowerdir+")
        monkeypatch.setattr(mounts, "_has_lowerdir_append", lambda: append)

    def test_top_layer_wins_and_writes_go_to_upper(self, work: Path) -> None:
        bottom = directory(work / "layers" / "0", same="bottom", low="low")
        top = directory(work / "layers" / "1", same="top")
        upper, scratch = directory(work / "upper"), directory(work / "scratch")
        target = directory(work / "rootfs")
        mounts.overlay(target, [top, bottom], upper, scratch)
        assert ((target / "same").read_text(), (target / "low").read_text()) == ("top", "low")
        (target / "new").write_text("new")
        assert (upper / "new").read_text() == "new"

    def test_more_layers_than_a_page_of_long_names_holds(self, work: Path) -> None:
        base = work / ("long-" * 20)
        layers = [directory(base / str(number), **{f"file{number}": str(number)}) for number in range(220)]
        target = directory(work / "rootfs")
        mounts.overlay(target, layers, None, None)
        assert len(list(target.iterdir())) == 220

    def test_names_longer_than_one_value_of_fsconfig(self, work: Path) -> None:
        base = work / ("a" * 200) / ("b" * 200)
        layers = [directory(base / "0", a="a"), directory(base / "1", b="b")]
        target = directory(base / "rootfs")
        mounts.overlay(target, layers, directory(base / "upper"), directory(base / "work"))
        (target / "c").touch()
        assert sorted(os.listdir(target)) == ["a", "b", "c"]

    def test_names_with_separators(self, work: Path) -> None:
        base = work / "odd,name:with\\all"
        layers = [directory(base / "0:0", a="a"), directory(base / "1,1", b="b"), directory(base / "2\\2", c="c")]
        target = directory(base / "rootfs")
        mounts.overlay(target, layers, directory(base / "upper"), directory(base / "work"))
        assert sorted(os.listdir(target)) == ["a", "b", "c"]

    def test_single_read_only_layer(self, work: Path) -> None:
        target = directory(work / "rootfs")
        mounts.overlay(target, [directory(work / "0", a="a")], None, None)
        assert (target / "a").read_text() == "a"
        with pytest.raises(OSError, match="Read-only"):
            (target / "b").touch()

    def test_options_reach_the_kernel(self, work: Path) -> None:
        layers, target = [directory(work / "0")], directory(work / "rootfs")
        mounts.overlay(target, layers, directory(work / "upper"), directory(work / "work"), options=["volatile"])
        assert [option for option in entry_at(target).super_options if "volatile" in option]  # spelt by kernel version

    def test_missing_layer_is_an_error_and_mounts_nothing(self, work: Path) -> None:
        target = directory(work / "rootfs")
        with pytest.raises(FileNotFoundError):
            mounts.overlay(target, [work / "0", work / "1"], None, None)
        assert not mounts.is_mount_point(target)

    def test_the_callers_directory_stays(self, work: Path) -> None:
        before = os.getcwd()
        mounts.overlay(directory(work / "rootfs"), [directory(work / "0"), directory(work / "1")], None, None)
        assert os.getcwd() == before


def test_kernel_says_why_an_overlay_is_refused(work: Path) -> None:
    if not mounts._has_lowerdir_append():
        pytest.skip("this kernel has no lowerdir+")
    layers = [directory(work / "0"), directory(work / "1")]
    with pytest.raises(OSError, match=r"Invalid argument \(.*Unknown parameter 'nonsense'\)"):
        mounts.overlay(directory(work / "rootfs"), layers, None, None, options=["nonsense=1"])


def test_remove_tree_refuses_when_something_is_mounted_below(work: Path) -> None:
    tree = directory(work / "tree", kept="x")
    mounts.tmpfs(directory(tree / "mounted"), size=1 << 20, mode=0o755)
    with pytest.raises(OSError, match="mounted is mounted there") as caught:
        fs.remove_tree(tree)
    assert caught.value.errno == errno.EBUSY
    assert (tree / "kept").exists()
    mounts.unmount(tree / "mounted")
    fs.remove_tree(tree)
    assert not tree.exists()


@pytest.mark.parametrize("where", [".", "below", "below/deep/deeper"])
def test_remove_tree_never_touches_what_is_mounted(work: Path, where: str) -> None:
    """A bind of the same file system has the same device: only the kernel knows it for a mount."""
    kept, tree = directory(work / "kept", file="x"), work / "tree"
    (tree / where).mkdir(parents=True)
    mounts.bind(kept, tree / where)
    with pytest.raises(OSError, match=r"mounted there|busy") as caught:
        fs.remove_tree(tree)
    assert caught.value.errno == errno.EBUSY
    assert (kept / "file").read_text() == "x"


def test_remove_tree_refuses_a_mounted_file(work: Path) -> None:
    kept, tree = directory(work / "kept", file="x"), directory(work / "tree", file="")
    mounts.bind(kept / "file", tree / "file")
    with pytest.raises(OSError, match="busy") as caught:
        fs.remove_tree(tree)
    assert caught.value.errno == errno.EBUSY
    assert (kept / "file").read_text() == "x"


def test_unmount_all_takes_what_is_stacked(work: Path) -> None:
    target = directory(work / "target")
    for _ in range(3):
        mounts.tmpfs(target, size=1 << 20, mode=0o755)
    assert mounts.unmount(target)
    mounts.unmount_all(target)
    assert not mounts.is_mount_point(target)
    assert not mounts.unmount(target)


def test_mount_table_is_that_of_the_calling_thread(work: Path) -> None:
    def inside() -> list[mounts.MountEntry]:
        libc.unshare(libc.CLONE_NEWNS)
        libc.mount(None, "/", None, libc.MS_PRIVATE | libc.MS_REC)
        mounts.unmount_tree(work)
        return mounts.mountinfo()

    assert work not in [entry.target for entry in threads.call_in_new_thread(inside)]
    assert mounts.is_mount_point(work)


def test_what_is_mounted_in_a_view_stays_there(work: Path) -> None:
    source, target = directory(work / "source", file="x"), directory(work / "target")
    mounts.make_shared(work)
    mounts.make_shared(source)
    mounts.tmpfs(directory(source / "below"), size=1 << 20, mode=0o755)
    (source / "below" / "file").touch()
    mounts.view(source, target, readonly=True, options=("noexec", "noatime"))
    assert {"ro", "noexec", "noatime"} <= set(entry_at(target).options)
    for place in (target, target / "below"):
        with pytest.raises(OSError, match="Read-only"):
            (place / "new").touch()
    other = work / "other"
    other.write_text("y")
    handle = os.open(target / "file", os.O_PATH)
    mounts.view(other, handle)
    os.close(handle)
    assert [(target / "file").read_text(), (source / "file").read_text()] == ["y", "x"]
    mounts.tmpfs(directory(source / "later"), size=1 << 20, mode=0o755)
    assert entry_at(target / "later").fstype == "tmpfs"
    mounts.unmount_all(target)
    assert (source / "below" / "file").exists()
    assert not [entry for entry in mounts.mountinfo() if entry.target.is_relative_to(target)]
