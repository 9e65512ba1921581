"""Addresses in a Wasm module that something has been put into, and what they were before: for backtraces.

Sans-IO. Invariant: an address of what was there is never one of what was not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Addresses:
    """Which byte of the module as it came an address means, in the one that was made of it.

    `moved`: from the first one on, in order, what the second was there. `ours`: here begins what it had not.
    """

    moved: tuple[tuple[int, int], ...]
    ours: int

    def text(self) -> str:
        """What `parse` reads. Its length does not depend on `behind`."""
        return f"{','.join(f'{new:08x}:{old:x}' for new, old in self.moved)} {self.ours:08x}"

    @staticmethod
    def parse(text: str) -> Addresses:
        """ValueError."""
        moved, ours = text.split(" ")
        pairs = (pair.split(":") for pair in moved.split(",") if pair)
        return Addresses(tuple((int(new, 16), int(old, 16)) for new, old in pairs), int(ours, 16))

    def behind(self, size: int) -> Addresses:
        """The same, when so many bytes have been put in front."""
        return Addresses(tuple((new + size, old) for new, old in self.moved), self.ours + size)

    def original(self, address: int) -> int | None:
        """None: of a function that it had not."""
        if address >= self.ours:
            return None
        shift = next((old - new for new, old in reversed(self.moved) if new <= address), 0)
        return address + shift


_FRAME: Final = re.compile(r"^ *\d+: +0x([0-9a-f]+) - (.*\n)", re.MULTILINE)


def as_it_came(backtrace: str, addresses: Addresses) -> str:
    """The engine's text, as if nothing had been put into the module."""
    number = 0

    def frame(found: re.Match[str]) -> str:
        nonlocal number
        address = addresses.original(int(found[1], 16))
        if address is None:
            return ""
        number += 1
        return f"  {number - 1:>3}: {address:#8x} - {found[2]}"

    return _FRAME.sub(frame, backtrace)
