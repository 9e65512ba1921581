"""Paths of requests, as text: nothing here is looked up."""

from __future__ import annotations

import posixpath

from cri_shim.model.errors import InvalidArgument

MAX_PATH = 4095  # PATH_MAX without the final NUL
MAX_COMPONENT = 255  # NAME_MAX, of every file system of Linux
_SHOWN = 100


def rooted(path: str) -> str:
    """`path` from the root, without `.`, `..`, doubled and trailing slashes; a relative one starts at the root."""
    return posixpath.normpath("/" + path.lstrip("/"))  # normpath alone keeps a double slash in front (POSIX)


def check_path(field: str, path: str) -> None:
    """Refuse what is not absolute, and what no file system can hold."""
    if not path.startswith("/"):
        msg = f"{field} {path[:_SHOWN]!r} is not an absolute path"
        raise InvalidArgument(msg)
    check_length(field, path)


def check_length(field: str, path: str) -> None:
    """Refuse a path, or a name in it, that is longer than the kernel takes."""
    longest = max((len(part.encode()) for part in path.split("/")), default=0)
    if longest > MAX_COMPONENT:
        msg = f"{field} {path[:_SHOWN]!r} has a name of {longest} bytes, at most {MAX_COMPONENT} are allowed"
        raise InvalidArgument(msg)
    if len(path.encode()) > MAX_PATH:
        msg = f"{field} {path[:_SHOWN]!r} is {len(path.encode())} bytes long, at most {MAX_PATH} are allowed"
        raise InvalidArgument(msg)
