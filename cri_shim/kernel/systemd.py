"""The one call that we make to systemd: put a process into a scope of its own (systemd.scope(5)).

Not for slices and services; the OCI runtime makes the containers' scopes itself. It speaks to the service manager
directly, as systemctl does, so that no message bus is needed. Blocks, bounded: for a thread. Invariant: a call that
fails raises OSError, whatever was at the other end.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

from cri_shim.wire import dbus

MANAGER: Final = Path("/run/systemd/private")
_SECONDS: Final = 5.0
_LINE: Final = 1024


def start_scope(name: str, pid: int, slice_name: str, *, manager: Path = MANAGER) -> None:
    """Ask for a scope `name` in a slice, with this process in it. systemd moves it a moment after this returns.

    The scope goes by itself with its last process, and a shutdown of the node does not stop it before others.
    """
    call = dbus.start_scope(
        name,
        {
            "Description": "conmon of a container",
            "Slice": slice_name,
            "PIDs": (pid,),
            "DefaultDependencies": False,
            "CollectMode": "inactive-or-failed",
        },
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as peer:
        peer.settimeout(_SECONDS)
        peer.connect(os.fspath(manager))
        peer.sendall(dbus.authenticate(os.geteuid()))
        with peer.makefile("rb") as answers:
            if not answers.readline(_LINE).startswith(b"OK"):
                msg = f"{manager} does not take our credentials"
                raise PermissionError(msg)
            peer.sendall(dbus.BEGIN + call)
            try:
                answer = None
                while answer is None:
                    fixed = answers.read(dbus.FIXED)
                    answer = dbus.parse(fixed + answers.read(dbus.rest_of(fixed)))
            except ValueError as error:
                msg = f"{manager}: {error}"
                raise ConnectionError(msg) from error
    if answer.error is not None:
        msg = f"systemd does not make {name}: {answer.error}"
        raise OSError(msg)
