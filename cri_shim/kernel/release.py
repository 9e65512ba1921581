"""The version of the running kernel, for what cannot be asked of it in another way."""

from __future__ import annotations

import os
import re


def kernel_release() -> tuple[int, int]:
    """Its first two numbers (uname(2))."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
