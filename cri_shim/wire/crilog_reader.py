"""CRI log entries back to what the container wrote, as the kubelet and crictl show it (contract: log format).

The counterpart of `cri_shim.wire.crilog`, for files that conmon writes as well. Not a file: bytes go in, entries come
out. Invariant: a line that is no entry (torn by a full disk) is left out, and never takes a neighbour with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cri_shim.wire.crilog import Stream

_LINE: Final = re.compile(
    rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) (stdout|stderr) ([^ ]+)(?: (.*))?", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line of a log file. `content` ends with a newline unless more of the same line follows."""

    second: bytes
    """Up to the whole second, as in the file."""
    fraction: bytes
    """Nine digits."""
    zone: bytes
    stream: Stream
    content: bytes

    @property
    def at(self) -> int:
        """Unix time, ns."""
        zone = self.zone.decode("ascii")
        whole = datetime.fromisoformat(self.second.decode("ascii") + ("+00:00" if zone == "Z" else zone))
        return int(whole.timestamp()) * 1_000_000_000 + int(self.fraction)

    @property
    def stamp(self) -> bytes:
        """RFC 3339 with nanoseconds, as crictl prints it."""
        zone = b"Z" if self.zone == b"+00:00" else self.zone
        return b"%s.%s%s" % (self.second, self.fraction, zone)


class LogReader:
    """Feed it what is read from the file; what is left of a line that has not ended is kept for the next time."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[LogEntry]:
        """The entries that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            entry = _parse(line)
            if entry is not None:
                yield entry


def _parse(line: bytes) -> LogEntry | None:
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    second, fraction, zone, stream, tags, content = found.groups()
    ended = tags.partition(b":")[0] != b"P"
    return LogEntry(
        second, (fraction or b"").ljust(9, b"0"), zone, Stream(stream), (content or b"") + (b"\n" if ended else b"")
    )
