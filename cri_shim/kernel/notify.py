"""Messages to the service manager (sd_notify(3)): fifteen lines instead of a library.

Not needed anywhere: without NOTIFY_SOCKET nothing happens. Invariant: a service manager that does not listen never
stops the daemon.
"""

from __future__ import annotations

import contextlib
import os
import socket


def notify(*fields: str) -> bool:
    """Send fields such as `READY=1`, `STOPPING=1`, `WATCHDOG=1`, `STATUS=…`; whether a manager was told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as manager,
    ):
        manager.sendto("\n".join(fields).encode(), address)
        return True
    return False


def watchdog_interval() -> float | None:
    """Seconds between two `WATCHDOG=1` that keep the manager content: half of what it allows; None without watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    allowed = os.environ.get("WATCHDOG_USEC", "")
    return int(allowed) / 2e6 if allowed.isdigit() and int(allowed) > 0 else None
