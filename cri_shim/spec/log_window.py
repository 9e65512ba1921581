"""Which part of a log a user asks for: the words of `--since`. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from cri_shim.model.errors import InvalidArgument

_UNITS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_DURATION: Final = re.compile(rf"(?:{_PART.pattern})+")


def since(text: str, now: int) -> int:
    """Unix time in ns of a point in time (RFC 3339) or of a duration before `now` (`90s`, `1h30m`). 0 for nothing."""
    if not text:
        return 0
    if _DURATION.fullmatch(text):
        seconds = sum(float(count) * _UNITS[unit] for count, unit in _PART.findall(text))
        return now - int(seconds * 1_000_000_000)
    try:
        point = datetime.fromisoformat(text)
        if point.tzinfo is None:
            point = point.replace(tzinfo=UTC)
        return int(point.timestamp() * 1_000_000_000)
    except (ValueError, OverflowError):
        msg = f"since: {text[:100]!r} is neither a time (2026-01-31T12:00:00Z) nor a duration (90s, 1h30m)"
        raise InvalidArgument(msg) from None
