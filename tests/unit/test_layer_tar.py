"""The tar headers of layers: agreement with tarfile on everything it writes, and errors for all that is broken."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri_shim.wire.layer_tar import (
    BLOCK,
    Entry,
    EntryReader,
    Kind,
    LayerFormatError,
    Whiteout,
    contained_path,
    is_aufs_mark,
    padded,
    parse_whiteout,
)
from tests.support import images

TYPES = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.LNKTYPE: Kind.HARDLINK,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.CHRTYPE: Kind.CHAR_DEVICE,
    tarfile.BLKTYPE: Kind.BLOCK_DEVICE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.FIFOTYPE: Kind.FIFO,
}


def entries_of(archive: bytes) -> list[Entry]:
    """Drive the reader over a whole archive, skipping data."""
    reader, position, found = EntryReader(), 0, []
    while not reader.finished:
        block = archive[position : position + reader.wanted]
        if not block and reader.wanted == BLOCK:
            reader.receive_end()
            break
        position += len(block)
        entry = reader.receive(block)
        if entry is not None:
            found.append(entry)
            position += padded(entry.size)
    return found


names = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x2FFF, exclude_characters="/"), min_size=1)
paths = st.lists(names, min_size=1, max_size=12).map("/".join).filter(lambda path: len(path.encode()) < 1000)
attributes = st.fixed_dictionaries(
    {
        "mode": st.integers(0, 0o7777),
        "uid": st.one_of(st.integers(0, 70000), st.integers(0, 2**32 - 2)),
        "gid": st.one_of(st.integers(0, 70000), st.integers(0, 2**32 - 2)),
        "mtime": st.one_of(st.integers(0, 2**34), st.integers(-(2**30), 0)),
    }
)


@st.composite
def members(draw: st.DrawFn) -> images.Entry:
    path, type_ = draw(paths), draw(st.sampled_from(list(TYPES)))
    more: dict[str, object] = {**draw(attributes)}
    data = draw(st.binary(max_size=1500)) if type_ == tarfile.REGTYPE else b""
    if type_ in {tarfile.LNKTYPE, tarfile.SYMTYPE}:
        more["linkname"] = draw(paths)
    if type_ in {tarfile.CHRTYPE, tarfile.BLKTYPE}:
        more["devmajor"], more["devminor"] = draw(st.integers(0, 4095)), draw(st.integers(0, 2**20 - 1))
    info = tarfile.TarInfo(path)
    info.type, info.size = type_, len(data)
    for name, value in more.items():
        setattr(info, name, value)
    return info, data


@settings(max_examples=120)
@given(st.lists(members(), max_size=5), st.sampled_from((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)))
def test_it_reads_what_tarfile_reads(written: Sequence[images.Entry], tar_format: int) -> None:
    archive = images.tar(written, tar_format)
    with tarfile.open(fileobj=io.BytesIO(archive)) as reference:
        expected = list(reference)
    found = entries_of(archive)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.name == theirs.name.rstrip("/")
        assert ours.kind is TYPES[theirs.type]
        assert (ours.mode, ours.uid, ours.gid, ours.size) == (theirs.mode, theirs.uid, theirs.gid, theirs.size)
        assert ours.mtime == int(theirs.mtime) * 10**9
        if ours.kind in {Kind.SYMLINK, Kind.HARDLINK}:
            assert ours.link == theirs.linkname
        if ours.kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}:
            assert ours.device == (theirs.devmajor, theirs.devminor)


def test_ustar_prefix_is_joined() -> None:
    path = "p" * 90 + "/" + "n" * 90
    (entry,) = entries_of(images.tar([images.file(path, b"x")], tarfile.USTAR_FORMAT))
    assert (entry.name, entry.size) == (path, 1)


def test_pax_records_override_the_header() -> None:
    capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    headers = {
        "mtime": "1700000000.123456789",
        "uid": "3000000",
        "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape"),
        "SCHILY.xattr.user.note": "ä",
    }
    (entry,) = entries_of(images.tar([images.file("ping", b"x", pax_headers=headers)]))
    assert entry.mtime == 1_700_000_000_123_456_789
    assert entry.uid == 3_000_000
    assert entry.xattrs == {"security.capability": capability, "user.note": "ä".encode()}


def test_global_records_hold_for_all_and_local_ones_for_one() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"mtime": "7"}) as archive:
        for name, headers in (("a", {"mtime": "9"}), ("b", {})):
            info = tarfile.TarInfo(name)
            info.pax_headers = headers
            archive.addfile(info)
    assert [entry.mtime for entry in entries_of(buffer.getvalue())] == [9 * 10**9, 7 * 10**9]


def test_bytes_that_are_no_utf8_survive() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    (entry,) = entries_of(images.tar([images.file(name)], tarfile.GNU_FORMAT))
    assert entry.name.encode("utf-8", "surrogateescape") == b"caf\xe9"


def header(**changes: bytes) -> bytes:
    """A good header with fields overwritten, and its checksum put right."""
    fields = {"name": 0, "mode": 100, "uid": 108, "size": 124, "mtime": 136, "type": 156, "link": 157, "major": 329}
    fields |= {"pieces": 386, "is_continued": 482}
    block = bytearray(images.tar([images.file("file")])[:BLOCK])
    for field, value in changes.items():
        block[fields[field] : fields[field] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extension(kind: bytes, data: bytes) -> bytes:
    return header(type=kind, size=b"%011o\0" % len(data)) + data.ljust(padded(len(data)), b"\0")


END = bytes(2 * BLOCK)


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (b"not a tar archive at all".ljust(BLOCK, b"!"), "not a number|checksum"),
        (header()[:-1] + b"!" + END, "checksum"),
        (header()[:300], "within a header"),
        (header(mode=b"zzz") + END, "mode"),
        (header(size=b"\xff" * 12) + END, "size -1"),
        (header(size=b"\x80" + b"\x7f" * 11) + END, "size"),
        (header(uid=b"\xff" * 8) + END, "uid -1"),
        (header(type=b"S", pieces=b"00000000000\0" * 2 + b"00000000007\0" * 2) + END, "'file' has a map of holes that"),
        (header(type=b"S", pieces=b"\xff" * 24) + END, "'file' has a map of holes that"),
        (header(type=b"S", is_continued=b"\1") + (b"\0" * 504 + b"\1" * 8) * 3, "within a header"),
        (header(type=b"S", is_continued=b"\1") + header()[:100], "map of holes without an end"),
        (header(type=b"Z") + END, "type b'Z'"),
        (header(type=b"3", major=b"7777777\0") + END, "device number"),
        (bytes(BLOCK) + header() + END, "after the end mark"),
        (header(type=b"x", size=b"77777777777\0") + END, "header extension of"),
        (header(type=b"x", size=b"%011o\0" % 20), "within a header"),
        (extension(b"x", b"9 path=a\n") + END, "ends after a header extension"),
        (extension(b"x", b"8 path=a\n") + header() + END, "malformed pax"),
        (extension(b"x", b"99 path=a\n") + header() + END, "malformed pax"),
        (extension(b"x", b"path=a\n") + header() + END, "malformed pax"),
        (extension(b"x", b"6 a=b\n6 =cd\n") + header() + END, "malformed pax"),
        (extension(b"x", b"10 size=x\n") + header() + END, "size b'x'"),
        (extension(b"x", b"11 size=-1\n") + header() + END, "size b'-1'"),
        (extension(b"x", b"12 mtime=1e\n") + header() + END, "mtime"),
        (extension(b"x", b"12 path=a\0b\n") + header() + END, "NUL"),
        (extension(b"x", b"22 GNU.sparse.major=1\n") + header() + END, "'file' has a map of holes without an end"),
        (extension(b"x", b"22 GNU.sparse.map=0,9\n") + header() + END, "'file' has a map of holes that"),
        (extension(b"x", b"22 GNU.sparse.map=0,x\n") + header() + END, "'file' has a malformed map of holes"),
        (extension(b"L", b"n" * 5000) + header() + END, "5000 bytes"),
    ],
)
def test_a_broken_archive_is_refused_by_name(archive: bytes, reason: str) -> None:
    with pytest.raises(LayerFormatError, match=reason):
        entries_of(archive)


@settings(max_examples=150)
@given(st.binary(max_size=3 * BLOCK), st.integers(0, 2 * BLOCK))
def test_any_damage_is_an_error_or_an_entry(noise: bytes, at: int) -> None:
    archive = bytearray(images.tar([images.file("a" * 150, b"data"), images.symlink("b", "c")]))
    archive[at : at + len(noise)] = noise
    try:
        entries = entries_of(bytes(archive))
    except LayerFormatError:
        return
    for entry in entries:
        assert 0 <= entry.size < 2**63
        assert "\0" not in entry.name + entry.link


def test_an_archive_may_end_without_a_trailer() -> None:
    assert [entry.name for entry in entries_of(header())] == ["file"]
    assert entries_of(b"") == []
    assert entries_of(bytes(BLOCK)) == []


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a/b", "a/b"),
        ("./a/b", "a/b"),
        ("/etc/x", "etc/x"),
        ("a//b/", "a/b"),
        (".", ""),
        ("./", ""),
        ("/", ""),
        ("a.b", "a.b"),
    ],
)
def test_names_become_paths_below_the_root(name: str, path: str) -> None:
    assert contained_path(name) == path


@pytest.mark.parametrize("name", ["..", "../x", "a/../b", "/..", "./../etc/passwd", "a/.."])
def test_names_that_climb_are_refused(name: str) -> None:
    with pytest.raises(LayerFormatError, match=r"'\.\.' in its path"):
        contained_path(name)


def test_whiteouts_are_recognised() -> None:
    assert parse_whiteout("a/.wh.b") == Whiteout("a", "b")
    assert parse_whiteout(".wh.b") == Whiteout("", "b")
    assert parse_whiteout("a/.wh..wh..opq") == Whiteout("a", "")
    assert parse_whiteout("a/b.wh.") is None
    assert parse_whiteout(".wh.a/b") is None
    assert is_aufs_mark("a/.wh..wh.plnk")
    assert not is_aufs_mark("a/.wh..wh..opq")
    for nothing in ("a/.wh.", "a/.wh..", "a/.wh..."):
        with pytest.raises(LayerFormatError, match="whiteout of nothing"):
            parse_whiteout(nothing)
