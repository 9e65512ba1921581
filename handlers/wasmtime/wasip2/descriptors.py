"""How many descriptors a guest may have: not all, since its worker has requests to answer that need some.

Invariant: whatever a guest opens, the worker can still be told to reopen its log, and be stopped.
"""

from __future__ import annotations

import errno
import functools
import os
import resource
import socket
from typing import Final

_OURS: Final = 32


def allowed(fd: int) -> int:
    """The descriptor, if the guest may have it. OSError EMFILE, and it is closed, if not."""
    if fd >= _limit():
        os.close(fd)
        raise _error()
    return fd


def allowed_socket(sock: socket.socket) -> socket.socket:
    """Likewise."""
    if sock.fileno() >= _limit():
        sock.close()
        raise _error()
    return sock


@functools.cache
def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OURS


def _error() -> OSError:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))
