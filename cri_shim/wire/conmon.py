"""What conmon says and hears: the sync pipe, the exit file, the control FIFO (conmon 2.1, `src/`).

Not the process (`cri_shim.adapters.monitor`). Invariant: what cannot be parsed is an error that shows the bytes;
conmon's own failures arrive as values, not as exceptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from cri_shim.model.errors import Internal
from cri_shim.model.streams import TerminalSize

REOPEN_LOG: Final = b"2 0 0\n"
"""Control message: close the log and open its path anew (ctrl.c)."""

ATTACH_OUTPUT: Final = 2
ATTACH_ERROR: Final = 3
"""First byte of a packet on the attach socket: what was written to standard output, to standard error (utils.h)."""

LOST: Final = 255
"""The exit status where conmon knew none."""


def resize(size: TerminalSize) -> bytes:
    """Control message: the new size of the container's terminal (ctrl.c: two numbers of at most three digits)."""
    return b"1 %d %d\n" % (min(size.height, 999), min(size.width, 999))


@dataclass(frozen=True, slots=True)
class Created:
    """The runtime's `create` succeeded; `pid` is the container's first process."""

    pid: int


@dataclass(frozen=True, slots=True)
class Failed:
    """It failed; `message` is what the runtime wrote to its standard error, stripped."""

    message: str


class _Sync(msgspec.Struct):
    """One line on the sync pipe (parent_pipe_fd.c)."""

    pid: int
    message: str = ""


def parse_sync(line: bytes) -> Created | Failed:
    """Parse the first line on the sync pipe. Internal when it is none."""
    try:
        said = msgspec.json.decode(line, type=_Sync)
    except msgspec.DecodeError as error:
        msg = f"conmon wrote {line[:200]!r} where it reports the container's pid: {error}"
        raise Internal(msg) from error
    return Created(said.pid) if said.pid > 0 else Failed(said.message.strip())


def parse_exit(content: bytes) -> int:
    """The status in an exit file, 0 to 255; LOST for the -1 that conmon writes when it could not wait."""
    try:
        status = int(content)
    except ValueError as error:
        msg = f"conmon wrote {content[:40]!r} into an exit file"
        raise Internal(msg) from error
    return status if 0 <= status <= 255 else LOST
