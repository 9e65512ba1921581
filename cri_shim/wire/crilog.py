"""CRI log lines: what a container wrote, cut into the entries that the kubelet and crictl read (contract: log format).

    2026-11-23T17:45:01.000000042Z stdout F the content of a line
    2026-11-23T17:45:01.000000042Z stderr P a piece; more of the same line follows, or the output ended here

Not a file and not a clock: bytes and a time go in, entries come out. Invariant: how the output was cut into reads never
shows in the entries, and no entry has more than 16 KiB of content.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

PIECE: Final = 16 * 1024
"""Bytes of content in one entry; a longer line becomes several, all but the last with the tag P."""


class Stream(enum.Enum):
    """The second word of an entry. With a terminal everything is stdout."""

    STDOUT = b"stdout"
    STDERR = b"stderr"


def format_timestamp(at: int) -> bytes:
    """RFC 3339 with nanoseconds, in UTC. `at` is Unix time in nanoseconds."""
    seconds, nanoseconds = divmod(at, 1_000_000_000)
    return b"%s.%09dZ" % (_second(seconds), nanoseconds)


@functools.lru_cache(maxsize=2)  # thousands of entries share a second
def _second(seconds: int) -> bytes:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S").encode("ascii")


class LineSplitter:
    """One output stream of one container. Holds back at most one entry's worth: a line that has not ended yet."""

    __slots__ = ("_rest", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream.value
        self._rest = b""

    def feed(self, data: bytes, at: int) -> bytes:
        """The entries that `data`, read at Unix time `at` (ns), completes."""
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        full, partial = self._prefixes(at)
        entries = _entries(data[:end], full, partial) if end else b""
        pieces = list(_pieces(data[end:]))
        self._rest = pieces.pop()
        return entries + b"".join([b"%s%s\n" % (partial, piece) for piece in pieces])

    def finish(self, at: int) -> bytes:
        """The output has ended: the entry of a last line without a newline, tagged P."""
        rest, self._rest = self._rest, b""
        _, partial = self._prefixes(at)
        return b"".join(
            [b"%s%s\n" % (partial, rest[start : start + PIECE]) for start in range(0, len(rest), PIECE)],
        )

    def _prefixes(self, at: int) -> tuple[bytes, bytes]:
        head = b"%s %s " % (format_timestamp(at), self._stream)
        return head + b"F ", head + b"P "


def _entries(lines: bytes, full: bytes, partial: bytes) -> bytes:
    """Entries of whole lines; `lines` ends with a newline. One carriage return before a newline is dropped."""
    lines = lines.replace(b"\r\n", b"\n")[:-1]
    if len(lines) <= PIECE or max(map(len, lines.split(b"\n"))) <= PIECE:
        return b"%s%s\n" % (full, lines.replace(b"\n", b"\n" + full))
    entries = []
    for line in lines.split(b"\n"):
        # The newline's own carriage return is gone by now: every byte has weight.
        *pieces, last = [line[start : start + PIECE] for start in range(0, len(line), PIECE)] or [b""]
        entries += [b"%s%s\n" % (partial, piece) for piece in pieces]
        entries.append(b"%s%s\n" % (full, last))
    return b"".join(entries)


def _pieces(line: bytes) -> Iterator[bytes]:
    """Cut to size, at least one. A carriage return at the end may prove to be the newline's, so it has no weight."""
    while len(line) - line.endswith(b"\r") > PIECE:
        yield line[:PIECE]
        line = line[PIECE:]
    yield line
