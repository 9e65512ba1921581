"""The uncompressed stream of a layer: gzip in all its forms, plain, damaged."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import threading
from collections.abc import Callable

import pytest

from cri_shim.zygote.stream import Growing, LayerStream, StreamError
from tests.support.images import zstd_compress

DATA = random.Random(1).randbytes(300_000) + bytes(3_000_000)
Open = Callable[[bytes], LayerStream]


@pytest.fixture
def open_stream() -> Open:
    def make(blob: bytes) -> LayerStream:
        fd = os.memfd_create("blob")
        os.write(fd, blob)
        os.lseek(fd, 0, os.SEEK_SET)
        progress, bell = os.pipe()
        os.close(bell)
        return LayerStream(Growing(fd, progress))

    return make


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


SKIPPABLE = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"


@pytest.mark.parametrize(
    "blob",
    [
        DATA,
        gzip.compress(DATA),
        b"".join(gzip.compress(DATA[at : at + 70_001]) for at in range(0, len(DATA), 70_001)),
        gzip.compress(DATA) + bytes(10_000),
        gzip.compress(DATA[:7]) + gzip.compress(b"") + gzip.compress(DATA[7:]),
        zstd_compress(DATA),
        b"".join(zstd_compress(DATA[at : at + 70_001]) for at in range(0, len(DATA), 70_001)),
        SKIPPABLE + zstd_compress(DATA) + SKIPPABLE,
    ],
    ids=["plain", "gzip", "members", "padded", "empty member", "zstd", "frames", "zstd:chunked"],
)
def test_it_gives_the_uncompressed_bytes(open_stream: Open, blob: bytes) -> None:
    stream = open_stream(blob)
    target = os.memfd_create("out")
    assert stream.read(10) == DATA[:10]
    stream.copy_to(target, 2_000_000)
    stream.skip(100)
    assert stream.read(5_000_000) == DATA[2_000_110:]
    assert stream.read(1) == b""
    assert os.pread(target, 3_000_000, 0) == DATA[10:2_000_010]
    assert stream.finish() == sha256(DATA)


def test_the_digest_counts_what_nobody_read(open_stream: Open) -> None:
    stream = open_stream(gzip.compress(DATA))
    stream.read(5)
    assert stream.finish() == sha256(DATA)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (b"\x28\xb5\x2f\xfd no frame at all", "damaged"),
        (zstd_compress(DATA)[:-1000], "ends early"),
        (zstd_compress(DATA) + b"something else", "followed by something else"),
        (gzip.compress(DATA)[:-1000], "ends early"),
        (gzip.compress(DATA)[:100_000] + b"garbage" + gzip.compress(DATA)[100_007:], "damaged|ends early"),
        (gzip.compress(DATA)[:-8] + bytes(8), "damaged"),
        (gzip.compress(DATA) + b"something else", "followed by something else"),
    ],
)
def test_a_damaged_blob_is_an_error(open_stream: Open, blob: bytes, reason: str) -> None:
    with pytest.raises(StreamError, match=reason):
        open_stream(blob).finish()


def test_a_file_that_is_cut_off_is_an_error(open_stream: Open) -> None:
    with pytest.raises(StreamError, match="within a file"):
        open_stream(b"12345").copy_to(os.memfd_create("out"), 6)


def test_a_blob_that_arrives_is_read_as_it_comes() -> None:
    blob, fd = gzip.compress(DATA), os.memfd_create("blob")
    progress, bell = os.pipe()

    def arrive() -> None:
        for at in range(0, len(blob), 10_007):
            os.pwrite(fd, blob[at : at + 10_007], at)
            os.write(bell, b".")
        os.close(bell)

    arriving = threading.Thread(target=arrive)
    arriving.start()
    stream = LayerStream(Growing(fd, progress))
    assert stream.read(len(DATA)) == DATA
    assert stream.finish() == sha256(DATA)
    arriving.join()
