"""What a tree looks like, in one number: made when a layer was unpacked, and again when somebody wants to check it.

Names, kinds, modes, owners, times, sizes and where links point to. Not extended attributes, and not what is in the
files, whose digest would take as long as unpacking. Invariant: nothing of the tree is opened but its directories, and
no symlink is followed.
"""

# Paths are strings here: pathlib would double the time of a layer of ten thousand files.
# ruff: noqa: PTH115

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any

from cri_shim.zygote.chroot import enter


def fingerprint(_: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """That of the directory `fds[0]`: `fingerprint`, in hex."""
    enter(fds[0])
    return {"fingerprint": of_tree()}


def of_tree() -> str:
    """Of all that is below the working directory, which is the root of this process."""
    hashed = hashlib.sha256()
    pending = [""]
    while pending:
        directory = pending.pop()
        with os.scandir(directory or ".") as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        for entry in entries:
            # Not entry.path: with "./" before it the longest name that there may be would be too long.
            path = f"{directory}/{entry.name}" if directory else entry.name
            status = entry.stat(follow_symlinks=False)
            mode, size, link = status.st_mode, 0, ""
            if stat.S_ISDIR(mode):
                pending.append(path)
            elif stat.S_ISREG(mode):
                size = status.st_size
            elif stat.S_ISLNK(mode):
                link = os.readlink(path)
            numbers = (mode, status.st_uid, status.st_gid, status.st_mtime_ns, size, status.st_rdev)
            hashed.update(f"{path}\0{link}\0{numbers}\n".encode(errors="surrogateescape"))
    return hashed.hexdigest()
