"""The uncompressed stream of a layer: gzip in all its forms, plain, damaged."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
from collections.abc import Callable

import pytest

from cri_shim.zygote.stream import LayerStream, StreamError

DATA = random.Random(1).randbytes(300_000) + bytes(3_000_000)
Open = Callable[[bytes, bool], LayerStream]


@pytest.fixture
def open_stream() -> Open:
    def make(blob: bytes, compressed: bool) -> LayerStream:
        fd = os.memfd_create("blob")
        os.write(fd, blob)
        os.lseek(fd, 0, os.SEEK_SET)
        return LayerStream(fd, compressed=compressed)

    return make


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize(
    ("blob", "compressed"),
    [
        (DATA, False),
        (gzip.compress(DATA), True),
        (b"".join(gzip.compress(DATA[at : at + 70_001]) for at in range(0, len(DATA), 70_001)), True),
        (gzip.compress(DATA) + bytes(10_000), True),
        (gzip.compress(DATA[:7]) + gzip.compress(b"") + gzip.compress(DATA[7:]), True),
    ],
    ids=["plain", "gzip", "members", "padded", "empty member"],
)
def test_it_gives_the_uncompressed_bytes(open_stream: Open, blob: bytes, compressed: bool) -> None:
    stream = open_stream(blob, compressed)
    target = os.memfd_create("out")
    assert stream.read(10) == DATA[:10]
    stream.copy_to(target, 2_000_000)
    stream.skip(100)
    assert stream.read(5_000_000) == DATA[2_000_110:]
    assert stream.read(1) == b""
    assert os.pread(target, 3_000_000, 0) == DATA[10:2_000_010]
    assert stream.finish() == sha256(DATA)


def test_the_digest_counts_what_nobody_read(open_stream: Open) -> None:
    stream = open_stream(gzip.compress(DATA), True)
    stream.read(5)
    assert stream.finish() == sha256(DATA)


@pytest.mark.parametrize(
    ("blob", "compressed", "reason"),
    [
        (gzip.compress(DATA), False, "media type says that it is not"),
        (DATA, True, "says gzip"),
        (b"\x28\xb5\x2f\xfd rest", True, "zstd"),
        (b"\x28\xb5\x2f\xfd rest", False, "zstd"),
        (gzip.compress(DATA)[:-1000], True, "ends early"),
        (gzip.compress(DATA)[:100_000] + b"garbage" + gzip.compress(DATA)[100_007:], True, "damaged|ends early"),
        (gzip.compress(DATA)[:-8] + bytes(8), True, "damaged"),
        (gzip.compress(DATA) + b"something else", True, "followed by something else"),
    ],
)
def test_a_damaged_blob_is_an_error(open_stream: Open, blob: bytes, compressed: bool, reason: str) -> None:
    with pytest.raises(StreamError, match=reason):
        open_stream(blob, compressed).finish()


def test_a_file_that_is_cut_off_is_an_error(open_stream: Open) -> None:
    with pytest.raises(StreamError, match="within a file"):
        open_stream(b"12345", False).copy_to(os.memfd_create("out"), 6)
