"""How often a loop runs: as its requirement says under `scripts/test --full`, less otherwise; always with one seed."""

from __future__ import annotations

import os
import random
from typing import Final

FULL: Final = "CRI_SHIM_FULL"
"""Set by `scripts/test --full`."""
SEED: Final = 20_240


def count(full: int, quick: int) -> int:
    """The number of rounds of a loop. The code is the same, only the number differs."""
    return full if os.environ.get(FULL) else quick


def seeded() -> random.Random:
    """A generator that gives every run the same numbers."""
    return random.Random(SEED)
