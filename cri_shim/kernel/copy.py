"""Copies of file trees, as they are: owners, modes, times, extended attributes, links, devices.

It blocks: call it in a thread. Invariant: no symlink of the tree is followed, and no file of it is opened but regular
ones, so that a hostile tree costs its own size and nothing else. The tree must not change meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import Final

_OF_OVERLAYFS: Final = "trusted.overlay."


def copy_contents(source: Path, target: Path) -> None:
    """Copy the directory `source` to `target`, an empty directory, with its attributes. OSError names the file.

    Hard links stay what they are within the tree. A socket is left out: nobody listens on a copy.
    """
    links: dict[tuple[int, int], str] = {}
    pending = [(os.fspath(source), os.fspath(target))]
    made: list[tuple[str, str]] = []
    while pending:
        directory, copy = pending.pop()
        made.append((directory, copy))
        with os.scandir(directory) as entries:
            for entry in entries:
                place = f"{copy}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    os.mkdir(place, 0o700)  # noqa: PTH102  thousands of names: no Path objects
                    pending.append((entry.path, place))
                else:
                    _copy_file(entry, place, links)
    for directory, copy in reversed(made):  # what is made in a directory changes its times
        _copy_attributes(directory, copy, os.lstat(directory))


def _copy_file(entry: os.DirEntry[str], place: str, links: dict[tuple[int, int], str]) -> None:
    status = entry.stat(follow_symlinks=False)
    identity = (status.st_dev, status.st_ino)
    if status.st_nlink > 1 and identity in links:
        os.link(links[identity], place, follow_symlinks=False)
        return
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(entry.path), place)  # noqa: PTH115, PTH211  as above
    elif stat.S_ISREG(status.st_mode):
        shutil.copyfile(entry.path, place, follow_symlinks=False)
    elif stat.S_ISSOCK(status.st_mode):
        return
    else:
        _make_node(place, status)
    _copy_attributes(entry.path, place, status)
    links[identity] = place


def _make_node(place: str, status: os.stat_result) -> None:
    try:
        os.mknod(place, status.st_mode, status.st_rdev)
    except OSError as error:  # Python leaves the name out
        raise OSError(error.errno, error.strerror, place) from error


def _copy_attributes(source: str, target: str, status: os.stat_result) -> None:
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    for name in os.listxattr(source, follow_symlinks=False):
        if not name.startswith(_OF_OVERLAYFS):
            value = os.getxattr(source, name, follow_symlinks=False)
            os.setxattr(target, name, value, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(target, stat.S_IMODE(status.st_mode))  # noqa: PTH101  after chown, which takes setuid away
    with contextlib.suppress(NotImplementedError):
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
