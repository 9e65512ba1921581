"""SELinux: whether it is on, the contexts that its policy has for containers, whether a label is one, labels of files.

Without libselinux: selinuxfs and one extended attribute are all it takes. Blocks: for a thread. Invariant: where
SELinux is off nothing is read and nothing is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

_FILESYSTEM: Final = Path("/sys/fs/selinux")
_CONFIG: Final = Path("/etc/selinux")
_ATTRIBUTE: Final = "security.selinux"
_WITHOUT_LABELS: Final = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.EROFS})


def is_enabled() -> bool:
    """Whether the kernel labels, enforcing or not."""
    return (_FILESYSTEM / "enforce").exists()


def container_contexts() -> str:
    """The text of the policy's `lxc_contexts`, empty when there is none."""
    policy = "targeted"
    with contextlib.suppress(OSError):
        for line in (_CONFIG / "config").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition("=")
            policy = value.strip() if key.strip() == "SELINUXTYPE" else policy
    with contextlib.suppress(OSError):
        return (_CONFIG / policy / "contexts" / "lxc_contexts").read_text(encoding="utf-8")
    return ""


def is_valid(label: str) -> bool:
    """Whether the policy in force knows the label (security_check_context(3))."""
    try:
        fd = os.open(_FILESYSTEM / "context", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, label.encode() + b"\0")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def relabel(path: Path, label: str) -> None:
    """Give a file, or a directory and all below it, the label; symlinks are labelled and never followed.

    What already has it is not written to, and a file system without labels is left as it is.
    """
    value = label.encode() + b"\0"
    _set(os.fspath(path), value)
    for _, directories, files, handle in os.fwalk(path, follow_symlinks=False):
        for name in (*directories, *files):
            _set(f"/proc/thread-self/fd/{handle}/{name}", value)


def _set(path: str, value: bytes) -> None:
    try:
        if _get(path) != value:
            os.setxattr(path, _ATTRIBUTE, value, follow_symlinks=False)
    except FileNotFoundError:
        return  # gone meanwhile
    except OSError as error:
        if error.errno not in _WITHOUT_LABELS:
            raise


def _get(path: str) -> bytes:
    with contextlib.suppress(OSError):
        return os.getxattr(path, _ATTRIBUTE, follow_symlinks=False)
    return b""
