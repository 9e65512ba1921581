"""Which protocol a client and the server speak on a connection: the answer to an HTTP request to upgrade. Pure.

A WebSocket if the client asks for one, SPDY/3.1 otherwise; the sub-protocol is the first of the client's list that is
known. Not the handshake itself (`wire.http_upgrade`, `wire.websocket`). Invariant: who is refused learns what there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from cri_shim.wire.http_upgrade import Refusal, Request

SPDY: Final = "SPDY/3.1"
PROTOCOL_HEADER: Final = "x-stream-protocol-version"
_ACCEPTED_HEADER: Final = "x-accepted-stream-protocol-versions"
_WEBSOCKET: Final = "websocket"
_NO_SUBPROTOCOL: Final = ""


@dataclass(frozen=True, slots=True)
class Subprotocol:
    """What flows on the connection. `version` is that of remotecommand; for port-forward it means nothing."""

    name: str
    version: int = 0
    in_base64: bool = False
    is_tunnel: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """Both sides know it."""

    is_websocket: bool
    subprotocol: Subprotocol


@dataclass(frozen=True, slots=True)
class Offer:
    """What the server knows for one kind of request."""

    spdy: tuple[Subprotocol, ...]
    websocket: tuple[Subprotocol, ...]


_VERSIONS: Final = tuple(
    Subprotocol("channel.k8s.io" if version == 1 else f"v{version}.channel.k8s.io", version)
    for version in (5, 4, 3, 2, 1)
)
REMOTE_COMMAND: Final = Offer(
    spdy=_VERSIONS,
    websocket=(
        *_VERSIONS,
        Subprotocol("v4.base64.channel.k8s.io", 4, in_base64=True),
        Subprotocol("base64.channel.k8s.io", 1, in_base64=True),
        Subprotocol(_NO_SUBPROTOCOL, 1),
    ),
)
PORT_FORWARD: Final = Offer(
    spdy=(Subprotocol("portforward.k8s.io"),),
    websocket=(
        Subprotocol("SPDY/3.1+portforward.k8s.io", is_tunnel=True),
        Subprotocol("v4.channel.k8s.io"),
        Subprotocol("v4.base64.channel.k8s.io", in_base64=True),
        Subprotocol(_NO_SUBPROTOCOL),
    ),
)


def choose(request: Request, offer: Offer) -> Chosen | Refusal:
    """Find what both know, or say why there is nothing."""
    upgrades = "upgrade" in [word.lower() for word in request.words("connection")]
    wanted = [word.lower() for word in request.words("upgrade")]
    if upgrades and _WEBSOCKET in wanted:
        return _choose_websocket(request, offer.websocket)
    names = request.words(PROTOCOL_HEADER)
    if not names:
        return _refuse(HTTPStatus.BAD_REQUEST, f"header {PROTOCOL_HEADER} is missing")
    chosen = _first(names, offer.spdy)
    if chosen is None:
        return _refuse(HTTPStatus.FORBIDDEN, *_nothing_common(names, offer.spdy))
    if not upgrades or SPDY.lower() not in wanted:
        return _refuse(HTTPStatus.BAD_REQUEST, f"unable to upgrade: headers Connection: Upgrade and Upgrade: {SPDY}")
    return Chosen(is_websocket=False, subprotocol=chosen)


def _choose_websocket(request: Request, known: tuple[Subprotocol, ...]) -> Chosen | Refusal:
    names = request.words("sec-websocket-protocol")
    chosen = _first(names or [_NO_SUBPROTOCOL], known)
    if chosen is None:
        return _refuse(HTTPStatus.FORBIDDEN, *_nothing_common(names, known))
    return Chosen(is_websocket=True, subprotocol=chosen)


def _first(names: list[str], known: tuple[Subprotocol, ...]) -> Subprotocol | None:
    by_name = {subprotocol.name: subprotocol for subprotocol in known}
    return next((by_name[name] for name in names if name in by_name), None)


def _nothing_common(names: list[str], known: tuple[Subprotocol, ...]) -> tuple[str, tuple[tuple[str, str], ...]]:
    accepted = [subprotocol.name for subprotocol in known if subprotocol.name]
    message = f"unable to upgrade: the client speaks {', '.join(names)}, the server {', '.join(accepted)}"
    return message, tuple((_ACCEPTED_HEADER, name) for name in accepted)


def _refuse(status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> Refusal:
    return Refusal(status, f"{message}\n".encode(), headers)
