"""Who the calling thread is: user, groups, capabilities. For children that become somebody else, once and for good.

Not for the daemon's own threads. Invariant: after `become` neither the thread nor what it starts can gain anything.
Source: capabilities(7), credentials(7).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Sequence
from typing import Final

from cri_shim.kernel import libc
from cri_shim.model.capabilities import NAMES

_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_VERSION_3: Final = 0x20080522


class _Header(ctypes.Structure):
    """`struct __user_cap_header_struct` (linux/capability.h)."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Set(ctypes.Structure):
    """32 bits of `struct __user_cap_data_struct`."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_Sets = _Set * 2
"""For 64 bits."""


def become(uid: int, gid: int, groups: Sequence[int], capabilities: Collection[str]) -> None:
    """Take an identity with at most these capabilities (names without CAP_), which only root keeps. OSError."""
    wanted = {bit for bit, name in enumerate(NAMES) if name in capabilities}
    for bit in range(len(NAMES)):
        if bit not in wanted:
            _drop_from_bounding_set(bit)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    os.setgroups(list(groups))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _set_capabilities(wanted if uid == 0 else set())
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _drop_from_bounding_set(bit: int) -> None:
    try:
        libc.prctl(_PR_CAPBSET_DROP, bit)
    except OSError as error:
        # One that this kernel does not know; one that the daemon may not drop it cannot pass on either.
        if error.errno not in {22, 1}:
            raise


def _set_capabilities(bits: Collection[int]) -> None:
    sets = _Sets()
    for bit in bits:
        half = sets[bit // 32]
        half.effective |= 1 << bit % 32
        half.permitted |= 1 << bit % 32
    libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), sets)
