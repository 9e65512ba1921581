"""Layers as builders write them, by the library that most of them use; each with its own ways."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from cri_shim.model.errors import PullError
from tests.support import go_archives, go_guests
from tests.support.go_archives import Write, entry
from tests.support.images import directory, file, layer, layer_of, symlink
from tests.support.layers import LayerStack, Seen, snapshot

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(go_guests.program() is None, reason="needs Go (https://go.dev) to build the writer"),
]

CAPABILITY = "\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
LONG = f"{'d' * 90}/{'e' * 60}"
LONGER = f"{'d' * 90}/{'e' * 200}/{'f' * 90}"


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    return go_archives.build(tmp_path_factory.mktemp("go"))


@pytest_asyncio.fixture
async def stack(tmp_path: Path) -> AsyncIterator[LayerStack]:
    made = LayerStack(tmp_path)
    yield made
    await made.zygote.aclose()


@pytest.mark.parametrize("tar_format", ["", "USTAR", "PAX", "GNU"])
async def test_every_format_of_the_library(stack: LayerStack, write: Write, tar_format: str) -> None:
    entries = [
        entry("bin/", "5", 0o2755, Gid=50, Seconds=1_000_000_000),
        entry("bin/su", "0", 0o4755, data=b"x" * 1000, Uid=1, Gid=2, Seconds=1_100_000_000),
        entry("bin/sudo", "1", 0o4755, Link="bin/su"),
        entry("bin/sh", "2", 0o777, Link="busybox", Uid=7, Seconds=1),
        entry(LONG, data=b"long"),
        entry("pipe", "6", 0o600, Uid=8),
        entry("null", "3", 0o666, Major=1, Minor=3),
        entry("empty"),
    ]
    expected = {
        "bin": Seen("directory", 0o2755, 0, 50, ""),
        "bin/su": Seen("file", 0o4755, 1, 2, "x" * 1000),
        "bin/sudo": Seen("file", 0o4755, 1, 2, "x" * 1000),
        "bin/sh": Seen("symlink", 0o777, 7, 0, "busybox"),
        os.path.dirname(LONG): Seen("directory", 0o755, 0, 0, ""),
        LONG: Seen("file", 0o644, 0, 0, "long"),
        "pipe": Seen("fifo", 0o600, 8, 0, ""),
        "null": Seen("device", 0o666, 0, 0, "1:3"),
        "empty": Seen("file", 0o644, 0, 0, ""),
    }
    times = {"bin": 1_000_000_000, "bin/su": 1_100_000_000, "bin/sh": 1}
    if tar_format != "USTAR":
        entries += [
            entry(LONGER, data=b"longer"),
            entry("ids", Uid=3_000_000, Gid=4_000_000_000, Seconds=-86_400),
            entry("ключ", data=b"key"),
            entry("far", "2", Link="t" * 300),
        ]
        expected |= {
            os.path.dirname(LONGER): Seen("directory", 0o755, 0, 0, ""),
            LONGER: Seen("file", 0o644, 0, 0, "longer"),
            "ids": Seen("file", 0o644, 3_000_000, 4_000_000_000, ""),
            "ключ": Seen("file", 0o644, 0, 0, "key"),
            "far": Seen("symlink", 0o777, 0, 0, "t" * 300),
        }
        times["ids"] = -86_400
    if tar_format in {"", "PAX"}:
        xattrs = {"SCHILY.xattr.security.capability": CAPABILITY, "SCHILY.xattr.user.note": "of a user"}
        entries.append(entry("ping", "0", 0o755, Records=xattrs))
        expected["ping"] = Seen("file", 0o755, 0, 0, "")
    (record,) = await stack.unpack(layer_of(write(entries, tar_format)))
    root = stack.layers.path(record)
    assert snapshot(root) == expected
    assert {name: (root / name).lstat().st_mtime for name in times} == times
    assert (root / "bin/su").stat().st_ino == (root / "bin/sudo").stat().st_ino
    if "ping" in expected:
        assert os.getxattr(root / "ping", "security.capability") == CAPABILITY.encode("latin-1")
        assert os.getxattr(root / "ping", "user.note") == b"of a user"


async def test_parts_of_seconds(stack: LayerStack, write: Write) -> None:
    """As buildah and docker keep them."""
    (record,) = await stack.unpack(layer_of(write([entry("a", Seconds=5, Nanos=123_456_789)], "PAX")))
    assert (stack.layers.path(record) / "a").stat().st_mtime_ns == 5_123_456_789


async def test_as_ko_writes(stack: LayerStack, write: Write) -> None:
    """Read-only directories with files in them, no times, names below a symlink of the base image."""
    base = layer([directory("./"), directory("run", 0o711), directory("var"), symlink("var/run", "/run")])
    app = write(
        [
            entry("ko-app", "5", 0o555, NoTime=True),
            entry("ko-app/server", "0", 0o555, data=b"ELF", NoTime=True),
        ]
    )
    data = write(
        [
            entry("var", "5", 0o555, NoTime=True),
            entry("var/run", "5", 0o555, NoTime=True),
            entry("var/run/ko", "5", 0o555, NoTime=True),
            entry("var/run/ko/page", "0", 0o555, data=b"page", NoTime=True),
        ]
    )
    records = await stack.unpack(base, layer_of(data), layer_of(app))
    with stack.merged(records) as root:
        seen = snapshot(root)
        assert seen["ko-app"] == Seen("directory", 0o555, 0, 0, "")
        assert seen["ko-app/server"] == Seen("file", 0o555, 0, 0, "ELF")
        assert seen["var/run"] == Seen("directory", 0o555, 0, 0, "")
        assert seen["var/run/ko/page"] == Seen("file", 0o555, 0, 0, "page")
        assert (root / "ko-app/server").stat().st_mtime == 0


async def test_as_kaniko_writes(stack: LayerStack, write: Write) -> None:
    """The root as `/`, directories without a slash at the end, whiteouts first, hard links by the name in the layer."""
    base = layer([directory("etc", 0o750, uid=3), file("etc/old"), file("etc/kept", b"kept"), file("gone/x")])
    change = write(
        [
            entry("/", "5", 0o755),
            entry(".wh.gone"),
            entry("etc/.wh.old"),
            entry("etc", "5", 0o755),
            entry("etc/one", data=b"1", Uid=5),
            entry("etc/two", "1", Link="etc/one"),
            entry("usr", "5", 0o755),
            entry("usr/bin", "5", 0o755),
            entry("usr/bin/tool", "0", 0o755, Records={"SCHILY.xattr.security.capability": CAPABILITY}),
        ]
    )
    with stack.merged(await stack.unpack(base, layer_of(change))) as root:
        assert sorted(snapshot(root)) == [
            "etc",
            "etc/kept",
            "etc/one",
            "etc/two",
            "usr",
            "usr/bin",
            "usr/bin/tool",
        ]
        assert (root / "etc").stat().st_uid == 0
        assert (root / "etc/two").stat().st_nlink == 2
        assert os.getxattr(root / "usr/bin/tool", "security.capability") == CAPABILITY.encode("latin-1")


@pytest.mark.parametrize("tar_format", ["", "PAX", "GNU"])
async def test_as_bazel_writes(stack: LayerStack, write: Write, tar_format: str) -> None:
    """Names with `./`, no directories or each of them again and again, no times and no owners."""
    entries = [
        entry("./", "5", 0o755),
        entry("./app/lib/deep/one", data=b"1"),
        entry("./app/", "5", 0o755),
        entry("./app/lib/", "5", 0o755),
        entry("./app/", "5", 0o755),
        entry("./app/lib/two", "0", 0o555, data=b"2"),
        entry("./app/runfiles", "2", Link="lib/deep"),
        entry("./app/runfiles/three", data=b"3"),
    ]
    (record,) = await stack.unpack(layer_of(write(entries, tar_format)))
    root = stack.layers.path(record)
    assert {name: seen.content for name, seen in snapshot(root).items() if seen.kind == "file"} == {
        "app/lib/deep/one": "1",
        "app/lib/two": "2",
        "app/lib/deep/three": "3",
    }
    assert (root / "app/lib/two").stat().st_mtime == 0
    assert record.key == record.diff_id or record.needs_parents


async def test_as_nix_writes(stack: LayerStack, write: Write) -> None:
    """A layer for each store path, with directories that nobody may write, all of one second after the epoch."""
    paths = [f"nix/store/{letter * 32}-{name}" for letter, name in (("a", "glibc"), ("b", "hello"))]
    blobs = [
        layer_of(
            write(
                [
                    entry("./", "5", 0o755, Seconds=1),
                    entry("./nix", "5", 0o755, Seconds=1),
                    entry("./nix/store", "5", 0o1775, Gid=30_000, Seconds=1),
                    entry(f"./{path}", "5", 0o555, Seconds=1),
                    entry(f"./{path}/bin", "5", 0o555, Seconds=1),
                    entry(f"./{path}/bin/tool", "0", 0o555, data=path.encode(), Seconds=1),
                    entry(f"./{path}/bin/same", "1", 0o555, Link=f"./{path}/bin/tool", Seconds=1),
                    entry(f"./{path}/other", "2", Link=f"/{paths[0]}/bin/tool", Seconds=1),
                ],
                "GNU",
            )
        )
        for path in paths
    ]
    top = layer_of(write([entry("bin", "2", Link=f"/{paths[1]}/bin")]))
    records = await stack.unpack(*blobs, top)
    assert [record.key for record in records] == [record.diff_id for record in records], "each is shared by all"
    with stack.merged(records) as root:
        seen = snapshot(root)
        assert seen["nix/store"] == Seen("directory", 0o1775, 0, 30_000, "")
        for path in paths:
            assert seen[path] == Seen("directory", 0o555, 0, 0, "")
            assert seen[f"{path}/bin/same"] == Seen("file", 0o555, 0, 0, path)
            assert (root / path / "bin/tool").stat().st_mtime == 1
        assert seen["bin"].content == f"/{paths[1]}/bin"


async def test_a_hard_link_before_what_it_names_is_refused(stack: LayerStack, write: Write) -> None:
    """As every other runtime does: there is nothing yet that it could be the name of."""
    blob = layer_of(write([entry("a", "1", Link="b"), entry("b", data=b"b")]))
    with pytest.raises(PullError, match="'a'"):
        await stack.unpack(blob)
