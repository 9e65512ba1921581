"""/proc/net/dev: what went through the interfaces of a network namespace (proc(5))."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_LINE: Final = re.compile(r"^\s*([^\s:|]+):\s*((?:[0-9]{1,20}\s+){15}[0-9]{1,20})\s*$", re.MULTILINE)
_MAX: Final = (1 << 64) - 1
_LOOPBACK: Final = "lo"
_USUAL: Final = "eth0"


@dataclass(frozen=True, slots=True)
class Interface:
    """Bytes and errors since the interface was made."""

    name: str
    rx_bytes: int
    rx_errors: int
    tx_bytes: int
    tx_errors: int


def parse_net_dev(text: str) -> tuple[Interface, ...]:
    """All interfaces but the loopback, the one that leads out of the pod first: eth0, or whichever the kernel names."""
    found = [
        _interface(name, [min(int(number), _MAX) for number in numbers.split()])
        for name, numbers in _LINE.findall(text)
        if name != _LOOPBACK
    ]
    return tuple(sorted(found, key=lambda interface: interface.name != _USUAL))


def _interface(name: str, columns: Sequence[int]) -> Interface:
    """Eight columns of what came in, eight of what went out: bytes, packets, errors and others."""
    return Interface(name, columns[0], columns[2], columns[8], columns[10])
