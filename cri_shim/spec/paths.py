"""Paths inside of a container, as text: nothing here is looked up."""

from __future__ import annotations

import posixpath


def rooted(path: str) -> str:
    """`path` from the root, without `.`, `..`, doubled and trailing slashes; a relative one starts at the root."""
    return posixpath.normpath("/" + path.lstrip("/"))  # normpath alone keeps a double slash in front (POSIX)
