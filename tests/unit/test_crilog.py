"""CRI log entries against a slow and obvious model, whole and in every cut."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cri_shim.wire.crilog import PIECE, LineSplitter, Stream, format_timestamp

AT = 1_795_454_701_000_000_042
HEAD = b"2026-11-23T17:25:01.000000042Z stdout "


def logged(chunks: Iterable[bytes]) -> bytes:
    splitter = LineSplitter(Stream.STDOUT)
    return b"".join([splitter.feed(chunk, AT) for chunk in chunks]) + splitter.finish(AT)


def model(output: bytes) -> bytes:
    """Line by line, as the format's text says it."""
    *lines, last = output.split(b"\n")
    entries = []
    for line in lines:
        content = line.removesuffix(b"\r")
        while len(content) > PIECE:
            entries.append(HEAD + b"P " + content[:PIECE] + b"\n")
            content = content[PIECE:]
        entries.append(HEAD + b"F " + content + b"\n")
    while last:
        entries.append(HEAD + b"P " + last[:PIECE] + b"\n")
        last = last[PIECE:]
    return b"".join(entries)


@pytest.mark.parametrize(
    ("output", "entries"),
    [
        (b"", b""),
        (b"hello\n", HEAD + b"F hello\n"),
        (b"\n", HEAD + b"F \n"),
        (b"a\r\nb\r\r\n", HEAD + b"F a\n" + HEAD + b"F b\r\n"),
        (b"no newline", HEAD + b"P no newline\n"),
        (b"x" * PIECE + b"\n", HEAD + b"F " + b"x" * PIECE + b"\n"),
        (b"x" * (PIECE + 1) + b"\n", HEAD + b"P " + b"x" * PIECE + b"\n" + HEAD + b"F x\n"),
        (b"\xff\x00\n", HEAD + b"F \xff\x00\n"),
    ],
)
def test_entries_of_known_output(output: bytes, entries: bytes) -> None:
    assert logged([output]) == entries
    assert model(output) == entries


words = st.one_of(
    st.sampled_from([b"\n", b"\r", b"\r\n", b"a", b"some text"]),
    st.integers(PIECE - 2, PIECE + 2).map(lambda size: b"x" * size),
    st.just(b"y" * (3 * PIECE)),
)


@example([b"x" * PIECE, b"\r", b"\r\n"], [])
@given(st.lists(words, max_size=12), st.lists(st.integers(0, 6 * PIECE), max_size=6))
def test_every_cut_gives_the_entries_of_the_model(written: list[bytes], cuts: list[int]) -> None:
    output = b"".join(written)
    chunks = [output[start:end] for start, end in pairwise([0, *sorted(cuts), len(output) + 6 * PIECE])]
    assert logged(chunks) == model(output)


def test_output_byte_by_byte() -> None:
    output = b"one\r\ntwo\n\n\rthree"
    assert logged(output[i : i + 1] for i in range(len(output))) == model(output)


def test_a_line_that_never_ends_is_held_back_by_one_entry_only() -> None:
    splitter = LineSplitter(Stream.STDERR)
    seen = b"".join([splitter.feed(b"z" * 1000, AT) for _ in range(1000)])
    assert seen.count(b"z") >= 1000 * 1000 - PIECE
    assert all(len(entry) <= PIECE + 64 for entry in seen.splitlines())


def test_stream_and_time_of_an_entry() -> None:
    splitter = LineSplitter(Stream.STDERR)
    assert splitter.feed(b"half ", 1) == b""
    assert splitter.feed(b"line\n", 1_000_000_000) == b"1970-01-01T00:00:01.000000000Z stderr F half line\n"


def test_timestamps_sort_as_text() -> None:
    times = [0, 1, 999_999_999, 1_000_000_000, AT, AT + 1]
    assert sorted(map(format_timestamp, times)) == list(map(format_timestamp, times))
