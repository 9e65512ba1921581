"""Kubernetes quantities: whole numbers with a decimal or binary suffix (`10M`, `64Mi`)."""

from __future__ import annotations

import re

_QUANTITY = re.compile(r"([0-9]+)(k|M|G|T|Ki|Mi|Gi|Ti)?")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_quantity(text: str) -> int | None:
    """The number that is meant, None for what is no quantity."""
    quantity = _QUANTITY.fullmatch(text.strip())
    return None if quantity is None else int(quantity[1]) * _UNITS[quantity[2] or ""]
