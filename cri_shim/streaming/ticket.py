"""What a token stands for, and how long the steps of a connection may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cri_shim.model.streams import Connect, Session, Wanted

EXEC: Final = "exec"
ATTACH: Final = "attach"
PORT_FORWARD: Final = "portforward"


@dataclass(frozen=True, slots=True)
class RemoteCommand:
    """One exec or attach."""

    kind: str
    """The first part of the URL's path."""
    check: Callable[[], None]
    """Raises a CriShimError that the client gets in place of streams."""
    wanted: Wanted
    session: Session


@dataclass(frozen=True, slots=True)
class Forward:
    """One port-forward."""

    kind: str
    check: Callable[[], None]
    ports: tuple[int, ...]
    connect: Connect


Ticket = RemoteCommand | Forward


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds."""

    idle: float = 4 * 3600.0
    """Without a byte of a stream in either direction; 0 = no limit."""
    head: float = 10.0
    """Until the HTTP request, and before it the TLS handshake, is there in full."""
    creation: float = 30.0
    """Until the client has opened the streams that belong together."""
