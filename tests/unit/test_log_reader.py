"""Reading logs: entries, wherever the bytes were cut; times; the last lines of a file; rotation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_shim.adapters.log_file import LogFile
from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.spec.log_window import since
from cri_shim.wire.crilog import LineSplitter, Stream, format_timestamp
from cri_shim.wire.crilog_reader import LogReader

NOON = 1_769_860_800_000_000_000  # 2026-01-31T12:00:00Z


@given(st.lists(st.tuples(st.sampled_from(Stream), st.binary(max_size=40_000)), max_size=6), st.integers(1, 5000))
def test_what_was_written_comes_back_however_it_is_cut(writes: list[tuple[Stream, bytes]], step: int) -> None:
    splitters = {stream: LineSplitter(stream) for stream in Stream}
    file = b"".join(splitters[stream].feed(data, NOON) for stream, data in writes)
    file += b"".join(splitter.finish(NOON) for splitter in splitters.values())
    reader = LogReader()
    entries = [entry for start in range(0, len(file), step) for entry in reader.feed(file[start : start + step])]
    for stream in Stream:
        wrote = b"".join(data for its, data in writes if its is stream)
        read = b"".join(entry.content for entry in entries if entry.stream is stream)
        assert read == re.sub(rb"\r\n", b"\n", wrote)
    assert {entry.at for entry in entries} <= {NOON}
    assert {entry.stamp for entry in entries} <= {format_timestamp(NOON)}


@pytest.mark.parametrize(
    ("line", "at", "stamp"),
    [
        (b"2026-01-31T12:00:00Z stdout F x", NOON, b"2026-01-31T12:00:00.000000000Z"),
        (b"2026-01-31T12:00:00.5+00:00 stdout F x", NOON + 500_000_000, b"2026-01-31T12:00:00.500000000Z"),
        (b"2026-01-31T14:00:00.000000001+02:00 stdout F:odd x", NOON + 1, b"2026-01-31T14:00:00.000000001+02:00"),
    ],
)
def test_times_as_runtimes_write_them(line: bytes, at: int, stamp: bytes) -> None:
    (entry,) = LogReader().feed(line + b"\n")
    assert (entry.at, entry.stamp, entry.content) == (at, stamp, b"x\n")


@pytest.mark.parametrize(
    "torn", [b"", b"2026-01-31T12:00:0", b"2026-01-31T12:00:00Z stdout", b"2026-01-31T12:00:00Z stdin F x", b"\0" * 99]
)
def test_a_torn_line_takes_no_neighbour_along(torn: bytes) -> None:
    good = b"2026-01-31T12:00:00Z stderr P x\n"
    assert [entry.content for entry in LogReader().feed(good + torn + b"\n" + good)] == [b"x", b"x"]


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("", 0),
        ("90s", NOON - 90 * 10**9),
        ("1h30m", NOON - 5400 * 10**9),
        ("1.5s", NOON - 15 * 10**8),
        ("250ms", NOON - 25 * 10**7),
        ("2026-01-31T12:00:00Z", NOON),
        ("2026-01-31T14:00:00+02:00", NOON),
    ],
)
def test_since(text: str, at: int) -> None:
    assert since(text, NOON) == at


@pytest.mark.parametrize("text", ["yesterday", "5", "-5m", "5m3", "2026-13-01T00:00:00Z", "h"])
def test_a_time_that_is_none(text: str) -> None:
    with pytest.raises(InvalidArgument, match="neither a time"):
        since(text, NOON)


@pytest.mark.parametrize("width", [1, 70, 70_000])
@pytest.mark.parametrize("tail", [0, 1, 2, 5, 9, None])
def test_the_last_lines_are_found(tmp_path: Path, width: int, tail: int | None) -> None:
    lines = [b"%d" % number * width + b"\n" for number in range(5)]
    (tmp_path / "log").write_bytes(b"".join(lines))
    log = LogFile(tmp_path / "log")
    assert log.open(tail)
    read = b"".join(iter(log.read, b""))
    log.close()
    assert read == b"".join(lines if tail is None else lines[max(0, 5 - tail) :])


def test_what_is_rotated_away_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path)
    assert not log.open()
    assert log.read() == b""
    path.write_bytes(b"one\n")
    assert log.read() == b"one\n"
    path.rename(tmp_path / "old")
    assert not log.turn_over()
    path.write_bytes(b"three\n")
    with (tmp_path / "old").open("ab") as old:
        old.write(b"two\n")
    assert not log.turn_over()
    assert log.read() == b"two\n"
    assert log.turn_over()
    assert log.read() == b"three\n"
    path.write_bytes(b"4\n")
    assert log.read() == b"4\n"
    log.close()


def test_only_a_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="no regular file"):
        LogFile(tmp_path).open()
