"""New namespaces of the calling thread, and what is set up inside of them: loopback, host name, sysctls.

Not their pins (`cri_shim.kernel.namespaces`). Imported by short-lived children too: it loads nothing that it can do
without. Invariant: a sysctl is written only where it belongs to a namespace that was made here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from cri_shim.kernel import libc, netlink
from cri_shim.model.errors import InvalidArgument

_FLAGS: Final = {"net": libc.CLONE_NEWNET, "ipc": libc.CLONE_NEWIPC, "uts": libc.CLONE_NEWUTS}
# sysctl(5) and kernel docs: these and no others belong to a namespace. All else would change the node.
_SYSCTL_OWNER: Final = (
    (re.compile(r"net\..+"), "net"),
    (re.compile(r"kernel\.(shm\w+|msg\w+|sem)|fs\.mqueue\..+"), "ipc"),
    (re.compile(r"kernel\.(hostname|domainname)"), "uts"),
)


def check_sysctls(names: Collection[str], kinds: Collection[str]) -> None:
    """InvalidArgument for the first one that no new namespace of these kinds owns."""
    for name in names:
        _check_sysctl(name, kinds)


def enter_new(kinds: Sequence[str], hostname: str, sysctls: Mapping[str, str]) -> None:
    """Leave the namespaces of these kinds (net, ipc, uts) for new ones, in the calling thread.

    `lo` is up in a new network namespace, `hostname` set in a new UTS namespace, `sysctls` (names with dots, checked)
    written inside. InvalidArgument for a sysctl that is unknown or refused.
    """
    libc.unshare(sum(_FLAGS[kind] for kind in kinds))
    if "net" in kinds:
        netlink.bring_loopback_up()
    if "uts" in kinds:
        libc.sethostname(hostname)
    for name, value in sysctls.items():
        _write_sysctl(name, value)


def _check_sysctl(name: str, kinds: Collection[str]) -> None:
    path = _sysctl_path(name)
    dotted = ".".join(path.parts)
    owner = next((kind for pattern, kind in _SYSCTL_OWNER if pattern.fullmatch(dotted)), None)
    if owner is None or path.is_absolute() or ".." in path.parts:
        msg = f"sysctl {name!r} is not namespaced: it would change the whole node"
        raise InvalidArgument(msg)
    if owner not in kinds:
        msg = f"sysctl {name!r} needs a {owner} namespace of the pod's own, but the pod uses the node's"
        raise InvalidArgument(msg)


def _sysctl_path(name: str) -> PurePosixPath:
    # As sysctl(8): whichever of `.` and `/` comes first separates, the other one is part of a name (eth0.1).
    first = re.search(r"[./]", name)
    swapped = name.translate(str.maketrans("./", "/."))
    return PurePosixPath(name if first and first[0] == "/" else swapped)


def _write_sysctl(name: str, value: str) -> None:
    # /proc/sys shows each opener the values of its own namespaces, so this thread writes the pod's.
    path = Path("/proc/sys") / _sysctl_path(name)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        msg = f"sysctl {name!r} does not exist on this node"
        raise InvalidArgument(msg, hint="the kernel lacks it, or a module is not loaded") from error
    except OSError as error:
        msg = f"sysctl {name!r} cannot be set to {value!r}: {error.strerror}"
        raise InvalidArgument(msg) from error
