"""Files of components whose streams are ours: what is reached, what is not, and which error is which code."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from handlers.wasmtime.wasip2 import filesystem_paths as paths
from handlers.wasmtime.wasip2.filesystem import Descriptor
from handlers.wasmtime.wasip2.interface import Failure
from handlers.wasmtime.wasip2.streams import IoError, StreamClosed
from handlers.wasmtime.wasip2.waiter import Waiter

NONE: frozenset[str] = frozenset()
FOLLOW = frozenset({"symlink-follow"})
NO_CHANGE = ("no-change", None)


class Place:
    """A directory, and a secret beside it."""

    def __init__(self, base: Path, resources: contextlib.ExitStack) -> None:
        self.path = base / "given"
        self.path.mkdir()
        (base / "secret").write_text("secret")
        self._resources = resources
        self.waiter = Waiter(contextlib.nullcontext)
        resources.callback(self.waiter.close)
        self.root = self.given()

    def given(self, *, readonly: bool = False) -> Descriptor:
        fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY)
        made = Descriptor(self.waiter, fd, reads=True, writes=False, readonly=readonly)
        self._resources.callback(made.close)
        return made

    def opened(self, path: str, *wanted: str, how: tuple[str, ...] = (), follow: frozenset[str] = FOLLOW) -> Descriptor:
        made = self.root.open_at(follow, path, frozenset(how), frozenset(wanted))
        self._resources.callback(made.close)
        return made


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with contextlib.ExitStack() as resources:
        yield Place(tmp_path, resources)


def code(call: Callable[..., Any], *arguments: object) -> Any:
    """Of the failure of a call."""
    with pytest.raises(Failure) as caught:
        call(*arguments)
    return caught.value.value


def test_a_file_is_written_and_read(place: Place) -> None:
    file = place.opened("file", "read", "write", how=("create", "exclusive"))
    assert file.write(b"hello world", 0) == 11
    assert file.read(5, 6) == (b"world", False)
    assert file.read(5, 11) == (b"", True)
    assert file.read(1, 1 << 63) == (b"", True)
    file.set_size(5)
    assert file.stat()["size"] == 5
    file.sync()
    file.sync_data()
    file.advise(0, 5, "sequential")
    assert (file.get_flags(), file.get_type()) == ({"read", "write"}, "regular-file")
    assert code(lambda: file.set_size(1 << 63)) == "file-too-large"
    assert code(lambda: file.write(b"x", 1 << 63)) == "file-too-large"
    assert code(lambda: place.opened("file", "write", how=("create", "exclusive"))) == "exist"


def test_streams_outlive_the_descriptor(place: Place) -> None:
    (place.path / "file").write_bytes(b"0123456789" * 5000)
    file = place.root.open_at(NONE, "file", NONE, frozenset({"read", "write"}))
    source, sink, end = file.read_via_stream(5), file.write_via_stream(2), file.append_via_stream()
    file.close()
    got = b""
    with contextlib.suppress(StreamClosed):
        while True:
            got += source.blocking_read(1 << 20)
    assert got == (b"0123456789" * 5000)[5:]
    sink.blocking_write_and_flush(b"ab")
    end.blocking_write_and_flush(b"end")
    for stream in (source, sink, end):
        stream.close()
    text = (place.path / "file").read_bytes()
    assert (text[:5], text[-4:], len(text)) == (b"01ab4", b"9end", 50003)


def test_nothing_outside_is_reached(place: Place) -> None:
    os.symlink("../secret", place.path / "out")
    os.symlink("/etc/hostname", place.path / "absolute")
    os.symlink("..", place.path / "up")
    (place.path / "below").mkdir()
    for path in ("../secret", "out", "absolute", "/etc/hostname", "up/secret", "below/../../secret", "/", ".."):
        assert code(place.opened, path, "read") == "not-permitted", path
        assert code(place.root.stat_at, FOLLOW, path) == "not-permitted", path
    for path in ("up/new", "../new", "/new", "below/../../new"):
        for call in (place.root.create_directory_at, place.root.unlink_file_at, place.root.remove_directory_at):
            assert code(call, path) == "not-permitted"
        assert code(place.root.open_at, NONE, path, frozenset({"create"}), NONE) == "not-permitted"
        assert code(place.root.symlink_at, "x", path) == "not-permitted"
        assert code(place.root.rename_at, "out", place.root, path) == "not-permitted"
        assert code(place.root.link_at, NONE, "out", place.root, path) == "not-permitted"
    # Also from below, where another directory of the same preopen would be above.
    below = place.opened("below", "read", how=("directory",))
    assert code(lambda: below.stat_at(FOLLOW, "..")) == "not-permitted"
    assert code(lambda: place.root.symlink_at("/etc", "new")) == "not-permitted"
    assert sorted(os.listdir(place.path.parent)) == ["given", "secret"]


def test_links_inside_are_followed_where_it_is_asked_for(place: Place) -> None:
    (place.path / "file").write_text("text")
    place.root.symlink_at("file", "link")
    place.root.symlink_at("link", "chain")
    assert place.opened("chain", "read").read(10, 0) == (b"text", False)
    assert code(lambda: place.opened("link", "read", follow=NONE)) == "loop"
    assert place.root.stat_at(NONE, "link")["type"] == "symbolic-link"
    assert place.root.stat_at(FOLLOW, "chain")["type"] == "regular-file"
    assert place.root.readlink_at("chain") == "link"
    moment = ("timestamp", {"seconds": 1_500_000_000, "nanoseconds": 7})
    before = (place.path / "file").stat()
    place.root.set_times_at(FOLLOW, "chain", NO_CHANGE, moment)
    found = (place.path / "file").stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (before.st_atime_ns, 1_500_000_000_000_000_007)
    place.root.set_times_at(NONE, "link", moment, moment)
    assert (place.path / "link").lstat().st_mtime_ns == 1_500_000_000_000_000_007
    os.symlink("circle", place.path / "circle")
    assert code(lambda: place.root.set_times_at(FOLLOW, "circle", NO_CHANGE, NO_CHANGE)) == "loop"
    assert code(lambda: place.root.link_at(FOLLOW, "link", place.root, "new")) == "invalid"


def test_names_are_made_moved_and_removed(place: Place) -> None:
    root = place.root
    root.create_directory_at("one/")
    root.create_directory_at("one/two")
    place.opened("one/file", "write", how=("create",))
    root.rename_at("one/file", place.opened("one/two", "read"), "moved")
    root.link_at(NONE, "one/two/moved", root, "linked")
    assert root.is_same_object(place.given())
    assert root.stat_at(NONE, "linked")["link-count"] == 2
    assert root.metadata_hash_at(NONE, "linked") == root.metadata_hash_at(NONE, "one/two/moved")
    assert root.metadata_hash_at(NONE, "linked") != root.metadata_hash()
    root.unlink_file_at("linked")
    root.unlink_file_at("one/two/moved")
    root.remove_directory_at("one/two/")
    root.remove_directory_at("one")
    assert os.listdir(place.path) == []


def test_a_directory_is_listed(place: Place) -> None:
    (place.path / "file").touch()
    (place.path / "directory").mkdir()
    os.symlink("file", place.path / "link")
    os.mkfifo(place.path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.path / "socket"))
    entries = place.root.read_directory()
    found = {entry["name"]: entry["type"] for entry in iter(entries.read_directory_entry, None)}
    assert found == {
        "file": "regular-file",
        "directory": "directory",
        "link": "symbolic-link",
        "fifo": "fifo",
        "socket": "socket",
    }
    # A FIFO holds nobody up when it is opened.
    assert code(place.opened, "fifo", "write") == "no-such-device"
    assert place.opened("fifo", "read").get_type() == "fifo"
    os.mkdir(os.fsencode(place.path) + b"/\xff")
    assert code(place.root.read_directory) == "illegal-byte-sequence"


def test_what_is_read_only_stays_as_it_is(place: Place) -> None:
    (place.path / "file").write_text("text")
    (place.path / "directory").mkdir()
    given = place.given(readonly=True)
    file = given.open_at(NONE, "file", NONE, frozenset({"read"}))
    directory = given.open_at(NONE, "directory", NONE, frozenset({"read"}))
    calls: list[Callable[[], object]] = [
        lambda: given.open_at(NONE, "file", NONE, frozenset({"write"})),
        lambda: given.open_at(NONE, "new", frozenset({"create"}), frozenset({"read"})),
        lambda: given.open_at(NONE, "file", frozenset({"truncate"}), frozenset({"read"})),
        lambda: directory.open_at(NONE, "new", frozenset({"create"}), frozenset({"read"})),
        lambda: given.create_directory_at("new"),
        lambda: directory.create_directory_at("new"),
        lambda: given.unlink_file_at("file"),
        lambda: given.remove_directory_at("directory"),
        lambda: given.rename_at("file", given, "new"),
        lambda: place.root.rename_at("file", given, "new"),
        lambda: place.root.link_at(NONE, "file", given, "new"),
        lambda: given.link_at(NONE, "file", place.root, "new"),
        lambda: given.symlink_at("file", "new"),
        lambda: given.set_times_at(NONE, "file", NO_CHANGE, NO_CHANGE),
        lambda: given.set_times(NO_CHANGE, NO_CHANGE),
        lambda: file.set_times(NO_CHANGE, NO_CHANGE),
        lambda: file.set_size(0),
        lambda: file.write(b"x", 0),
        lambda: file.write_via_stream(0),
        file.append_via_stream,
    ]
    assert [code(call) for call in calls] == ["not-permitted"] * len(calls)
    assert given.get_flags() == {"read"}
    assert sorted(os.listdir(place.path)) == ["directory", "file"]
    assert (place.path / "file").read_text() == "text"
    file.close()
    directory.close()


def test_errors_have_their_codes(place: Place) -> None:
    (place.path / "file").write_text("text")
    (place.path / "full").mkdir()
    (place.path / "full" / "x").touch()
    file, root = place.opened("file", "read"), place.root
    expected: dict[str, list[Callable[[], object]]] = {
        "no-entry": [
            lambda: place.opened("nothing", "read"),
            lambda: place.opened("", "read"),
            lambda: root.stat_at(NONE, "nothing"),
            lambda: root.unlink_file_at("nothing"),
            lambda: root.unlink_file_at(""),
            lambda: root.rename_at("nothing", root, "new"),
        ],
        "exist": [lambda: root.create_directory_at("full"), lambda: root.symlink_at("x", "file")],
        "is-directory": [
            lambda: place.opened("full", "write"),
            lambda: root.unlink_file_at("full"),
            lambda: root.read_via_stream(0),
        ],
        "not-directory": [
            lambda: place.opened("file", "read", how=("directory",)),
            lambda: place.opened("file/x", "read"),
            lambda: root.remove_directory_at("file"),
            lambda: file.open_at(NONE, "x", NONE, NONE),
            file.read_directory,
            lambda: file.stat_at(NONE, "x"),
        ],
        "not-empty": [lambda: root.remove_directory_at("full")],
        "bad-descriptor": [
            lambda: root.read(1, 0),
            lambda: root.set_size(0),
            lambda: root.write_via_stream(0),
            lambda: file.write(b"x", 0),
        ],
        "invalid": [
            lambda: place.opened("x", "read", how=("directory", "create")),
            lambda: root.create_directory_at("."),
            lambda: root.readlink_at("file"),
            lambda: place.opened("a\0b", "read"),
            lambda: root.create_directory_at("a\0b"),
            lambda: root.symlink_at("", "new"),
        ],
        "name-too-long": [lambda: root.create_directory_at("n" * 300)],
    }
    for name, calls in expected.items():
        assert [code(call) for call in calls] == [name] * len(calls)


def test_an_error_of_a_stream_is_told_by_its_code(place: Place) -> None:
    (place.path / "file").write_text("text")
    stream = place.opened("file", "read").write_via_stream(0)
    case, error = code(stream.blocking_write_and_flush, b"x")
    assert (case, isinstance(error, IoError)) == ("last-operation-failed", True)
    assert paths.error_code(error.cause) == "bad-descriptor"
    stream.close()


def test_no_errno_of_the_interface_is_unknown() -> None:
    assert paths.error_code(OSError(errno.EDQUOT, "")) == "quota"
    assert paths.error_code(OSError(errno.EIO, "")) == "io"
    assert paths.error_code(OSError(9999, "")) == "io"
