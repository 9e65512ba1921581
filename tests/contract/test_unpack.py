"""Layers as overlayfs shows them after unpacking: against a model of the rules, and case by case."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import stat
import struct
import subprocess
import tarfile
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from cri_shim.model.errors import CriShimError, PullError
from cri_shim.model.ids import Digest
from tests.support import images, scale
from tests.support.images import device, directory, fifo, file, hardlink, layer, opaque, symlink, whiteout
from tests.support.layers import LayerStack, Seen, snapshot

pytestmark = pytest.mark.root

CAPABILITY = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
BASE = layer([directory("./"), directory("etc", 0o750, uid=3, gid=4), file("etc/conf", b"base"), file("top", b"t")])


@pytest_asyncio.fixture
async def stack(tmp_path: Path) -> AsyncIterator[LayerStack]:
    made = LayerStack(tmp_path)
    yield made
    await made.zygote.aclose()


async def test_everything_an_archive_can_say_is_kept(stack: LayerStack) -> None:
    xattrs = {
        "SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape"),
        "SCHILY.xattr.trusted.overlay.redirect": "/elsewhere",
    }
    entries = [
        directory("bin", 0o2755, gid=50, mtime=1_000_000_000),
        file("bin/su", b"x" * 5000, 0o4755, uid=1, gid=2, mtime=1_100_000_000),
        file("bin/ping", b"p", 0o755, uid=5, pax_headers=xattrs | {"mtime": "1200000000.5"}),
        hardlink("bin/sudo", "bin/su"),
        symlink("bin/sh", "busybox", uid=7, mtime=1_300_000_000),
        fifo("pipe", 0o600, uid=8),
        device("null", "c", 1, 3),
        device("disk", "b", 8, 1),
        file("empty"),
    ]
    (record,) = await stack.unpack(layer(entries))
    root = stack.layers.path(record)
    su, ping, sh = root / "bin/su", root / "bin/ping", root / "bin/sh"
    assert stat.S_IMODE(su.stat().st_mode) == 0o4755
    assert (su.stat().st_uid, su.stat().st_gid, su.stat().st_mtime) == (1, 2, 1_100_000_000)
    assert (root / "bin/sudo").stat().st_ino == su.stat().st_ino
    assert ping.stat().st_mtime_ns == 1_200_000_000_500_000_000
    assert os.getxattr(ping, "security.capability") == CAPABILITY
    assert os.listxattr(ping) == ["security.capability"]
    assert (sh.lstat().st_uid, sh.lstat().st_mtime) == (7, 1_300_000_000)
    assert (root / "bin").stat().st_mtime == 1_000_000_000
    assert stat.S_IMODE((root / "bin").stat().st_mode) == 0o2755
    seen = snapshot(root)
    assert seen["pipe"] == Seen("fifo", 0o600, 8, 0, "")
    assert seen["null"] == Seen("device", 0o666, 0, 0, "1:3")
    assert stat.S_ISBLK((root / "disk").lstat().st_mode)
    assert (record.inodes, record.size) == (8, 8192 + 4096 + 4096)
    assert record.key == record.diff_id


@pytest.mark.parametrize("media_type", [images.TAR, images.TAR_GZIP, images.TAR_ZSTD])
@pytest.mark.parametrize("said", [images.TAR, images.TAR_GZIP, images.TAR_ZSTD])
async def test_the_content_says_how_it_is_compressed(stack: LayerStack, media_type: str, said: str) -> None:
    blob = replace(layer([file("a", b"1" * 3000)], media_type), media_type=said)
    (record,) = await stack.unpack(blob)
    assert (stack.layers.path(record) / "a").read_bytes() == b"1" * 3000


async def test_long_and_odd_names(stack: LayerStack) -> None:
    long = "/".join(["d" * 200] * 20)
    longest = f"{long}/{'f' * (4095 - len(long) - 1)}"
    odd = b"caf\xe9\n\x01".decode("utf-8", "surrogateescape")
    (record,) = await stack.unpack(layer([file(longest, b"1"), file(odd, b"2"), file("ключ", b"3")]))
    root = os.fsencode(stack.layers.path(record))
    with contextlib.chdir(root):
        assert Path(longest).read_bytes() == b"1"
    assert sorted(os.listdir(root))[-2:] == [b"d" * 200, "ключ".encode()]
    assert b"caf\xe9\n\x01" in os.listdir(root)
    await stack.layers.remove(record.number)
    assert stack.left() == []


async def test_a_later_entry_replaces_an_earlier_one(stack: LayerStack) -> None:
    entries = [
        directory("a"),
        file("a/old"),
        file("a", b"now a file"),
        symlink("b", "a"),
        directory("b"),
        file("b/c", b"1"),
        file("b/c", b"2"),
        hardlink("d", "b/c"),
        file("d", b"own"),
        directory("e", 0o700),
        directory("e", 0o711),
    ]
    (record,) = await stack.unpack(layer(entries))
    seen = snapshot(stack.layers.path(record))
    assert {path: (found.kind, found.content) for path, found in seen.items()} == {
        "a": ("file", "now a file"),
        "b": ("directory", ""),
        "b/c": ("file", "2"),
        "d": ("file", "own"),
        "e": ("directory", ""),
    }
    assert seen["e"].mode == 0o711


async def test_symlinks_in_a_path_are_followed_inside(stack: LayerStack) -> None:
    entries = [
        directory("usr"),
        directory("usr/lib"),
        symlink("lib", "usr/lib"),
        file("lib/libc.so", b"c"),
        symlink("abs", "/usr"),
        file("abs/one", b"1"),
        symlink("up", "../../../../usr/lib"),
        file("up/two", b"2"),
        symlink("new", "made/here"),
        file("new/three", b"3"),
    ]
    (record,) = await stack.unpack(layer(entries))
    seen = snapshot(stack.layers.path(record))
    files = {path: found.content for path, found in seen.items() if found.kind == "file"}
    assert files == {"usr/lib/libc.so": "c", "usr/one": "1", "usr/lib/two": "2", "made/here/three": "3"}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([file("../evil", b"x")], r"'../evil' has '\.\.'"),
        ([file("a/../../evil", b"x")], r"has '\.\.'"),
        ([symlink("out", "/"), file("out/../evil", b"x")], r"has '\.\.'"),
        ([hardlink("link", "../../etc/passwd")], r"has '\.\.'"),
        ([hardlink("passwd", "/etc/passwd")], "'etc/passwd' is in no layer"),
        ([symlink("etc", "/etc"), hardlink("p", "etc/passwd")], "Too many levels"),
        ([symlink("e", "/etc"), hardlink("p", "e/passwd")], "'e/passwd' is in no layer"),
        ([symlink("a", "b"), symlink("b", "a"), file("a/x")], "'a/x': Too many levels"),
        ([file("f"), file("f/g")], "entry 'f/g': 'f' is not a directory"),
        ([fifo("f"), file("f/g")], "entry 'f/g': 'f' is not a directory"),
        ([file("n" * 300)], "File name too long"),
        ([symlink("s", "")], "entry 's': No such file"),
        ([directory("d"), hardlink("h", "d")], "entry 'h': Operation not permitted"),
        ([hardlink("h", ".")], "hardlink to the root"),
        ([file(".")], "root of the layer is not a directory"),
        ([whiteout("x"), hardlink("h", "x")], "'x', which the layer removes"),
    ],
)
async def test_a_hostile_archive_is_refused_by_name(
    stack: LayerStack, entries: list[images.Entry], reason: str
) -> None:
    blob = layer(entries)
    with pytest.raises(PullError, match=reason) as caught:
        await stack.unpack(blob)
    assert f"layer {blob.digest}: " in str(caught.value)
    assert stack.left() == []


async def test_nothing_outside_is_reached_by_absolute_names_and_links(stack: LayerStack, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    entries = [
        file(f"{victim}/absolute", b"x"),
        symlink("escape", str(victim)),
        file("escape/through", b"x"),
        symlink("deep", "../" * 30 + str(victim).lstrip("/")),
        file("deep/through2", b"x"),
        file("/etc/cri-shim-escape", b"x"),
    ]
    (record,) = await stack.unpack(layer(entries))
    assert list(victim.iterdir()) == []
    assert not Path("/etc/cri-shim-escape").exists()
    inside = stack.layers.path(record) / str(victim).lstrip("/")
    assert sorted(path.name for path in inside.iterdir()) == ["absolute", "through", "through2"]


async def test_a_child_cannot_be_made_to_import_from_the_layer(stack: LayerStack) -> None:
    """A module planted where the host's library is must not run, whatever fails afterwards."""
    planted = b"open('/pwned', 'w').write('x')\n"
    paths = [f"{os.path.dirname(os.__file__)}/{name}.py" for name in ("traceback", "linecache", "tokenize", "shutil")]
    entries = [*(file(path, planted) for path in paths), file("x"), file("x/y")]
    with pytest.raises(PullError, match="'x' is not a directory"):
        await stack.unpack(layer(entries))
    assert not Path("/pwned").exists()
    assert stack.left() == []


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (replace(BASE, data=BASE.data[:-20]), "ends early|damaged"),
        (replace(BASE, data=BASE.data[:40] + b"\0\0\0\0" + BASE.data[44:]), "damaged|checksum|number|early"),
        (images.layer_of(b"no tar at all" * 100), "checksum|not a number"),
        (images.layer_of(images.tar([file("a", b"x" * 2000)])[:1500]), "ends within a file"),
        (replace(BASE, diff_id="sha256:" + "0" * 64), "expected content with diff ID sha256:0000"),
        (images.Blob(b"\x28\xb5\x2f\xfdzstd", images.TAR_ZSTD, "sha256:" + "0" * 64), "ends early|damaged"),
    ],
)
async def test_a_broken_layer_is_refused_and_leaves_nothing(stack: LayerStack, blob: images.Blob, reason: str) -> None:
    with pytest.raises(PullError, match=reason):
        await stack.unpack(blob)
    assert stack.left() == []


async def test_whiteouts_hide_lower_layers_only(stack: LayerStack) -> None:
    lower = layer([directory("d"), file("d/a", b"1"), file("d/b", b"1"), directory("e"), file("e/x", b"1"), file("f")])
    upper = layer(
        [
            whiteout("d/a"),
            directory("e"),
            file("e/y", b"2"),
            opaque("e"),
            whiteout("f"),
            directory("f"),
            file("f/in", b"2"),
            directory("g"),
            file("g/own", b"2"),
            whiteout("g"),
        ]
    )
    records = await stack.unpack(lower, upper)
    with stack.merged(records) as merged:
        files = {path: found.content for path, found in snapshot(merged).items() if found.kind == "file"}
    assert files == {"d/b": "1", "e/y": "2", "f/in": "2", "g/own": "2"}


async def test_an_opaque_root_hides_all_below(stack: LayerStack) -> None:
    lower = layer([directory("d"), file("d/a"), file("f"), directory("k"), file("k/old")])
    records = await stack.unpack(lower, layer([opaque(""), directory("k"), file("k/new"), file("n")]))
    with stack.merged(records) as merged:
        assert sorted(snapshot(merged)) == ["k", "k/new", "n"]


async def test_implied_directories_look_like_those_below(stack: LayerStack) -> None:
    middle = layer([file("unrelated")])
    records = await stack.unpack(BASE, middle, layer([file("etc/new", b"n"), file("fresh/x", b"f")]))
    with stack.merged(records) as merged:
        seen = snapshot(merged)
        assert (merged / "etc").stat().st_mtime == images.MTIME
    assert seen["etc"] == Seen("directory", 0o750, 3, 4, "")
    assert seen["fresh"] == Seen("directory", 0o755, 0, 0, "")
    assert (seen["etc/conf"].content, seen["etc/new"].content) == ("base", "n")
    assert [record.needs_parents for record in records] == [False, False, True]
    assert records[1].key == records[1].diff_id
    assert records[2].key != records[2].diff_id


async def test_the_root_directory_is_inherited_when_it_is_unusual(stack: LayerStack) -> None:
    fedora = layer([directory("./", 0o555), file("a")])
    records = await stack.unpack(fedora, layer([file("b")]))
    assert stat.S_IMODE(stack.layers.path(records[1]).stat().st_mode) == 0o555
    assert records[1].needs_parents
    plain = await stack.unpack(BASE, layer([file("b")]))
    assert not plain[1].needs_parents
    assert plain[1].inherits_root


async def test_a_hardlink_into_a_lower_layer_is_copied_up(stack: LayerStack) -> None:
    xattrs = {"SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape")}
    tool = file("opt/bin/tool", b"#!", 0o4711, uid=9, pax_headers=xattrs)
    lower = layer([directory("opt", 0o700), directory("opt/bin", 0o711), tool, symlink("ln", "opt")])
    upper = layer([hardlink("alias", "opt/bin/tool"), hardlink("again", "alias"), hardlink("ln2", "ln")])
    records = await stack.unpack(lower, upper)
    with stack.merged(records) as merged:
        status = (merged / "alias").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_nlink) == (0o4711, 9, 3)
        assert (merged / "opt/bin/tool").stat().st_ino == status.st_ino
        assert os.getxattr(merged / "again", "security.capability") == CAPABILITY
        assert stat.S_IMODE((merged / "opt").stat().st_mode) == 0o700
        assert os.readlink(merged / "ln2") == "opt"
    assert records[1].needs_parents


async def test_a_hardlink_comes_before_what_replaces_its_target(stack: LayerStack) -> None:
    lower = layer([file("f", b"old", 0o604), file("g", b"gone")])
    upper = layer([hardlink("f1", "f"), hardlink("f2", "f1"), file("f", b"new"), hardlink("g1", "g"), whiteout("g")])
    records = await stack.unpack(lower, upper)
    with stack.merged(records) as merged:
        seen = snapshot(merged)
    assert {path: found.content for path, found in seen.items()} == {"f": "new", "f1": "old", "f2": "old", "g1": "gone"}
    assert seen["f2"].mode == 0o604


async def test_a_hardlink_does_not_see_what_is_hidden(stack: LayerStack) -> None:
    lower = layer([directory("d"), file("d/f", b"1")])
    hidden = layer([directory("d"), opaque("d")])
    with pytest.raises(PullError, match="'d/f' is in no layer"):
        await stack.unpack(lower, hidden, layer([hardlink("h", "d/f")]))


async def test_names_below_a_symlink_of_a_lower_layer_go_where_it_leads(stack: LayerStack) -> None:
    lower = layer(
        [directory("usr"), directory("usr/lib", 0o711, uid=6), file("usr/lib/a", b"1"), symlink("lib", "usr/lib")]
    )
    upper = layer([file("lib/b", b"2"), file("lib/sub/c", b"3"), hardlink("lib/d", "lib/b")])
    records = await stack.unpack(lower, upper)
    with stack.merged(records) as merged:
        assert os.readlink(merged / "lib") == "usr/lib"
        seen = snapshot(merged)
        assert {path for path, found in seen.items() if found.kind == "file"} == {
            "usr/lib/a",
            "usr/lib/b",
            "usr/lib/d",
            "usr/lib/sub/c",
        }
        assert (seen["usr/lib"].mode, seen["usr/lib"].uid) == (0o711, 6)


async def test_a_symlink_of_a_lower_layer_cannot_lead_out(stack: LayerStack, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    lower = layer([symlink("out", str(victim))])
    with pytest.raises(PullError, match="is not a directory"):
        await stack.unpack(lower, layer([file("out/x")]))
    assert list(victim.iterdir()) == []


Model = dict[str, Seen]
NAMES = ("a", "b", "c")


def below(tree: Model, path: str) -> list[str]:
    return [known for known in tree if known.startswith(f"{path}/")]


def drop(tree: Model, path: str) -> None:
    for known in [path, *below(tree, path)]:
        tree.pop(known, None)


def make_parents(tree: Model, path: str) -> bool:
    """False where a file is in the way."""
    parts = path.split("/")[:-1]
    parents = ["/".join(parts[: length + 1]) for length in range(len(parts))]
    if any(parent in tree and tree[parent].kind != "directory" for parent in parents):
        return False
    for parent in parents:
        tree.setdefault(parent, Seen("directory", 0o755, 0, 0, ""))
    return True


class RandomLayer:
    """Entries at random, and `tree` as it is with them: whiteouts act on what was there before the layer."""

    def __init__(self, dice: random.Random, tree: Model) -> None:
        self.entries: list[images.Entry] = []
        self._dice = dice
        self._tree = tree
        self._own: set[str] = set()
        for _ in range(dice.randint(0, 2)):
            self._hide(self._path())
        for number in range(dice.randint(1, 6)):
            path = self._path()
            if self._is_free(path) and make_parents(tree, path):
                self._own.add(path)
                add = dice.choice((self._file, self._file, self._directory, self._symlink, self._link))
                add(path, Seen("", dice.choice((0o700, 0o755, 0o640)), dice.randint(0, 3), number, str(number)))

    def _path(self) -> str:
        return "/".join(self._dice.choice(NAMES) for _ in range(self._dice.randint(1, 3)))

    def _is_free(self, path: str) -> bool:
        """An archive with one name twice, or a name below a file of its own, has tests of its own."""
        return not any(f"{path}/".startswith(f"{own}/") or own.startswith(f"{path}/") for own in self._own)

    def _hide(self, path: str) -> None:
        if any(info.name.startswith(f"{path}/") for info, _ in self.entries):
            return  # hidden, and needed for the mark of something in it: no builder writes that
        if self._dice.random() < 0.7:
            if make_parents(self._tree, path):
                drop(self._tree, path)
                self.entries.append(whiteout(path))
        elif make_parents(self._tree, f"{path}/x"):
            for known in below(self._tree, path):
                del self._tree[known]
            self.entries.append(opaque(path))

    def _file(self, path: str, look: Seen) -> None:
        drop(self._tree, path)
        self._tree[path] = replace(look, kind="file")
        self.entries.append(file(path, look.content.encode(), look.mode, uid=look.uid, gid=look.gid))

    def _directory(self, path: str, look: Seen) -> None:
        if path in self._tree and self._tree[path].kind != "directory":
            drop(self._tree, path)
        self._tree[path] = replace(look, kind="directory", content="")
        self.entries.append(directory(path, look.mode, uid=look.uid, gid=look.gid))

    def _symlink(self, path: str, look: Seen) -> None:
        drop(self._tree, path)
        self._tree[path] = replace(look, kind="symlink", mode=0o777)
        self.entries.append(symlink(path, look.content, uid=look.uid, gid=look.gid))

    def _link(self, path: str, look: Seen) -> None:
        files = [name for name, found in self._tree.items() if found.kind == "file"]
        targets = [name for name in files if not f"{name}/".startswith(f"{path}/")]
        if not targets:
            self._file(path, look)
            return
        target = self._dice.choice(targets)
        found = self._tree[target]
        drop(self._tree, path)
        self._tree[path] = found
        self.entries.append(hardlink(path, target))


async def test_random_stacks_look_as_the_rules_say(stack: LayerStack) -> None:
    dice = random.Random(20)
    for round_number in range(25):
        tree: Model = {}
        written = [RandomLayer(dice, tree).entries for _ in range(dice.randint(1, 5))]
        records = await stack.unpack(*(layer(entries, images.TAR) for entries in written))
        with stack.merged(records) as merged:
            seen = snapshot(merged)
        told = [[(info.name, info.type, info.linkname) for info, _ in entries] for entries in written]
        assert seen == tree, f"round {round_number}: {told}"


async def test_hundreds_of_lower_layers_can_be_looked_at(stack: LayerStack) -> None:
    bottom, middle = await stack.unpack(layer([directory("d", 0o700), file("d/f")]), layer([directory("m")]))
    chain = Digest("sha256:" + "c" * 64)
    record = await stack.add(layer([file("d/g")]), chain, [bottom, *[middle] * 490])
    assert stat.S_IMODE((stack.layers.path(record) / "d").stat().st_mode) == 0o700


async def test_a_full_disk_is_named(stack: LayerStack, tmp_path: Path) -> None:
    stack.layout.layers.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(stack.layout.layers)], check=True)
    try:
        with pytest.raises(CriShimError, match="no space left on the file system of"):
            await stack.unpack(layer([file("big", random.Random(1).randbytes(1_000_000))]))
        assert stack.left() == []
    finally:
        subprocess.run(["umount", str(stack.layout.layers)], check=True)


async def test_gigabytes_of_zeros_cost_neither_disk_nor_memory(stack: LayerStack) -> None:
    size = scale.count(full=10 << 30, quick=1 << 30)
    info = tarfile.TarInfo("zeros")
    info.size = size
    head, block = info.tobuf(), bytes(1 << 20)
    packed, digest = zlib.compressobj(1, wbits=31), hashlib.sha256()
    data = bytearray()
    for piece in itertools.chain((head,), itertools.repeat(block, size >> 20), (bytes(1024),)):
        digest.update(piece)
        data += packed.compress(piece)
    data += packed.flush()
    (record,) = await stack.unpack(images.Blob(bytes(data), images.TAR_GZIP, f"sha256:{digest.hexdigest()}"))
    unpacked = (stack.layers.path(record) / "zeros").stat()
    assert unpacked.st_size == size
    assert unpacked.st_blocks * 512 <= record.size + 4096 < size // 100


FORMATS = {
    "v7": ["--format=v7"],
    "ustar": ["--format=ustar"],
    "oldgnu": ["--format=oldgnu", "--sparse"],
    "gnu": ["--format=gnu", "--sparse"],
    "pax 0.0": ["--format=posix", "--sparse", "--sparse-version=0.0"],
    "pax 0.1": ["--format=posix", "--sparse", "--sparse-version=0.1"],
    "pax 1.0": ["--format=posix", "--sparse", "--sparse-version=1.0", "--xattrs", "--xattrs-include=*"],
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=list(FORMATS))
async def test_what_gnu_tar_writes_comes_out_as_it_was(stack: LayerStack, tmp_path: Path, options: list[str]) -> None:
    source = tmp_path / "source"
    (source / "d/e").mkdir(parents=True)
    (source / "d/e").chmod(0o2750)
    (source / "d/file").write_text("text")
    (source / "d/file").chmod(0o4711)
    os.chown(source / "d/file", 7, 8)
    (source / "d/link").hardlink_to(source / "d/file")
    (source / "d/soft").symlink_to("../d/file")
    if "--format=v7" not in options:
        os.mkfifo(source / "pipe")
    os.setxattr(source / "d/e", "user.note", b"a\0b")
    os.setxattr(source / "d/soft", "trusted.note", b"x", follow_symlinks=False)
    if len(options) > 1:
        (source / ("n" * 200)).write_text("long name")
        (source / "far").symlink_to("t" * 300)
    with (source / "holes").open("wb") as file:
        for place in range(0, 3_000_000, 100_000):  # more pieces than a header has room for
            file.seek(place)
            file.write(b"data at %d" % place)
        file.truncate(3_500_000)
    command = ["tar", *options, "-C", str(source), "-cf", "-", "."]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    (record,) = await stack.unpack(images.layer_of(archive))
    root = stack.layers.path(record)
    assert snapshot(root) == snapshot(source)
    for name in ("d", "d/file", "d/soft", "holes"):
        assert int((root / name).lstat().st_mtime) == int((source / name).lstat().st_mtime)
    assert (root / "d/link").stat().st_ino == (root / "d/file").stat().st_ino
    if len(options) > 1:
        assert (root / "holes").stat().st_blocks <= (source / "holes").stat().st_blocks
    if "--xattrs" in options:
        assert os.getxattr(root / "d/e", "user.note") == b"a\0b"
        assert os.getxattr(root / "d/soft", "trusted.note", follow_symlinks=False) == b"x"


async def test_files_in_directories_that_hand_things_down_are_as_the_archive_says(stack: LayerStack) -> None:
    """A setgid bit or a default ACL of a directory must not reach what is made in it."""
    access = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in ACL)
    acl = {"SCHILY.xattr.system.posix_acl_default": access.decode("utf-8", "surrogateescape")}
    entries = [
        file("first", mode=0o666),
        directory("g", 0o2777, gid=50),
        file("g/f", mode=0o666),
        directory("g/d"),
        directory("a", 0o777, pax_headers=acl),
        file("a/f", mode=0o666),
        file("a/s", mode=0o6755),
    ]
    (record,) = await stack.unpack(layer(entries))
    seen = snapshot(stack.layers.path(record))
    assert {name: (found.mode, found.gid) for name, found in seen.items()} == {
        "first": (0o666, 0),
        "g": (0o2777, 50),
        "g/f": (0o666, 0),
        "g/d": (0o755, 0),
        "a": (0o777, 0),
        "a/f": (0o666, 0),
        "a/s": (0o6755, 0),
    }


ACL = ((1, 4, 0xFFFFFFFF), (4, 4, 0xFFFFFFFF), (32, 4, 0xFFFFFFFF))
"""Owner, group, others: read. (tag, permissions, id; linux/posix_acl_xattr.h)"""


async def test_a_million_entries_and_more_are_refused(stack: LayerStack) -> None:
    """Names that mean nothing outside of aufs: they make no file, and are entries all the same."""
    head = tarfile.TarInfo(".wh..wh.plnk").tobuf()
    number = scale.count(full=1_000_001, quick=20_001)
    blob = images.layer_of(head * number + bytes(1024))
    if number > 1_000_000:
        with pytest.raises(PullError, match=r"entry '.wh..wh.plnk': the layer has more than 1000000 entries"):
            await stack.unpack(blob)
        assert stack.left() == []
    else:
        await stack.unpack(blob)


def raw(name: bytes = b"victim", **fields: bytes) -> bytes:
    """A header with fields that no tool writes."""
    places = {"name": 0, "mode": 100, "size": 124, "type": 156, "link": 157}
    block = bytearray(tarfile.TarInfo("victim").tobuf())
    for field, value in {"name": name, **fields}.items():
        block[places[field] : places[field] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(record: bytes) -> bytes:
    size = len(record) + len(b"  \n")
    record = b"%d %s\n" % (size if size < 10 else size + 1, record)
    return raw(type=b"x", size=b"%011o\0" % len(record)) + record.ljust(512, b"\0")


GOOD = images.tar([file("good")])[:512]


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (raw(size=b"\xff" * 12), "after entry 'good': entry 'victim' has the size -1"),
        (pax(b"size=-9") + raw(), "after entry 'good': entry 'victim' has the size b'-9'"),
        (raw(size=b"77777777777\0"), "entry 'victim': the layer ends within a file"),
        (pax(b"path=a\0b") + raw(), "after entry 'good': a name with a NUL in it"),
        (pax(b"linkpath=a\0b") + raw(type=b"2"), "after entry 'good': a link target with a NUL in it"),
        (raw(type=b"Z"), "after entry 'good': entry 'victim' is of type b'Z'"),
        (raw()[:-1] + b"!", "after entry 'good': a header with a wrong checksum"),
        (raw(type=b"3"), None),
        (raw(b"a\nb"), None),
        (raw(b"good", type=b"5"), None),
        (raw(b"good", type=b"1", link=b"good"), None),
    ],
)
async def test_what_no_tool_writes_is_refused_by_layer_and_entry_or_contained(
    stack: LayerStack, archive: bytes, reason: str | None
) -> None:
    blob = images.layer_of(GOOD + archive + bytes(1024))
    if reason is None:
        (record,) = await stack.unpack(blob)
        assert len(snapshot(stack.layers.path(record))) in {1, 2}
        return
    with pytest.raises(PullError) as caught:
        await stack.unpack(blob)
    assert str(caught.value).startswith(f"layer {blob.digest}: {reason}")
    assert stack.left() == []


async def test_a_layer_key_is_the_chain_only_where_it_must_be(stack: LayerStack) -> None:
    chain = Digest("sha256:" + "c" * 64)
    await stack.layers.open(())
    base = await stack.add(BASE, Digest(BASE.diff_id))
    alone = layer([directory("x"), file("x/y")])
    assert (await stack.add(alone, chain, [base])).key == alone.diff_id
    assert (await stack.add(layer([file("etc/z")]), chain, [base])).key == chain
