"""The two calls that we make to systemd: put a process into a scope of its own (systemd.scope(5)), and limit that.

Not for slices and services; an OCI runtime makes the scopes of its containers itself. It speaks to the service manager
directly, as systemctl does, so that no message bus is needed. Blocks, bounded: for a thread. Invariant: a call that
fails raises OSError, whatever was at the other end.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cri_shim.wire import dbus

MANAGER: Final = Path("/run/systemd/private")
_SECONDS: Final = 5.0
_LINE: Final = 1024


_NONE: Final[Mapping[str, dbus.Property]] = {}


def start_scope(
    name: str,
    pid: int,
    slice_name: str,
    *,
    description: str,
    properties: Mapping[str, dbus.Property] = _NONE,
    manager: Path = MANAGER,
) -> None:
    """Ask for a scope `name` in a slice, with this process in it. systemd moves it a moment after this returns.

    The scope goes by itself with its last process, and a shutdown of the node does not stop it before others.
    """
    fixed: Mapping[str, dbus.Property] = {
        "Description": description,
        "Slice": slice_name,
        "PIDs": (pid,),
        "DefaultDependencies": False,
        "CollectMode": "inactive-or-failed",
    }
    _ask(dbus.start_scope(name, {**fixed, **properties}), name, manager)


def set_properties(name: str, properties: Mapping[str, dbus.Property], *, manager: Path = MANAGER) -> None:
    """Change a scope that there is."""
    _ask(dbus.set_properties(name, properties), name, manager)


def _ask(call: bytes, name: str, manager: Path) -> None:
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
        msg = f"systemd refuses {name}: {answer.error}"
        raise OSError(msg)
