"""The socket on which a runtime hands over the terminal that it has made for a detached process.

Not the terminal (`cri_shim.kernel.tty`). Invariant: it is gone from the file system when the runtime has ended, and
what was sent to it is taken or closed.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from cri_shim.model.errors import Internal


class ConsoleSocket:
    """Open from before the runtime starts until it has ended: the kernel keeps what it sends.

    `path` is what the runtime is told.
    """

    def __init__(self, path: Path, listener: socket.socket) -> None:
        self.path = path
        self._listener = listener

    def take(self) -> int:
        """The master end, of which the caller is the owner. Internal when the runtime has sent none."""
        with contextlib.suppress(BlockingIOError):
            peer, _ = self._listener.accept()
            with peer:
                peer.setblocking(False)
                _, fds, _, _ = socket.recv_fds(peer, 4096, 1)
            for fd in fds:
                os.set_inheritable(fd, False)
                return fd
        msg = "the runtime has started the process and sent no terminal for it"
        raise Internal(msg)


@contextlib.contextmanager
def console_socket(path: Path) -> Iterator[ConsoleSocket]:
    """Listen at `path`; one that an earlier daemon has left there goes."""
    with contextlib.ExitStack() as opened:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, directory)
        # By the descriptor, in this process and in the runtime's: a path may be longer than a socket's address.
        short = Path(f"/proc/{os.getpid()}/fd/{directory}/{path.name}")
        listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.setblocking(False)
        path.unlink(missing_ok=True)
        listener.bind(str(short))
        opened.callback(path.unlink, missing_ok=True)
        listener.listen()
        yield ConsoleSocket(short, listener)
