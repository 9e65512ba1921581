"""What an applet is told of its container. Values only, on their way from the daemon as JSON."""

from __future__ import annotations

import msgspec


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `ps`. `proc` is its name in the host's /proc, where it is measured; empty for a thread."""

    pid: int
    """In the container, where the module that it was made for is 1."""
    command: str
    proc: str = ""
    cpu_ns: int = 0
    memory: int = 0
    """Bytes."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """`command`: the applet's own, of which the first word has been found to be one."""

    command: tuple[str, ...]
    placement: str
    why: str
    module: str
    listen: tuple[int, ...]
    memory_limit: int
    """Bytes; 0 = none."""
    cpu_limit: str
    """Empty = none."""
    processes: tuple[Process, ...]
