"""echo, true, false and sleep: what hooks and probes call for its exit status, or for the time that it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final

from handlers.wasmtime.applets.options import UsageError
from handlers.wasmtime.applets.program import Container

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def run_echo(container: Container, words: Sequence[str]) -> int:
    """Its words; with -n without a newline."""
    ends = "" if words[:1] == ["-n"] else "\n"
    container.out.write(" ".join(words if ends else words[1:]) + ends)
    return 0


def run_true(container: Container, words: Sequence[str]) -> int:
    """Nothing, with success."""
    del container, words
    return 0


def run_false(container: Container, words: Sequence[str]) -> int:
    """Nothing, without."""
    del container, words
    return 1


def run_sleep(container: Container, words: Sequence[str]) -> int:
    """The sum of its times: seconds, or with a unit of s, m, h, d."""
    del container
    if not words:
        msg = "missing operand"
        raise UsageError(msg)
    time.sleep(sum(_seconds(word) for word in words))
    return 0


def _seconds(word: str) -> float:
    number, unit = (word[:-1], _UNITS[word[-1]]) if word[-1:] in _UNITS else (word, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        msg = f"invalid time interval {word!r}"
        raise UsageError(msg)
    return min(seconds, 1e9)
