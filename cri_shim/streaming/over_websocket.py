"""Opens a WebSocket for what a token stands for. Apart from `conversation`, which loads it when needed."""

from __future__ import annotations

from cri_shim.streaming.ticket import Forward, RemoteCommand, Ticket
from cri_shim.wire import portforward, remotecommand
from cri_shim.wire.http_upgrade import Request
from cri_shim.wire.mux import Mux
from cri_shim.wire.negotiation import Subprotocol
from cri_shim.wire.remotecommand import CHANNELS, FROM_CLIENT, Role
from cri_shim.wire.websocket import Channels, HandshakeRefused, Tunnel, WebSocket


def open_mux(request: Request, ticket: Ticket, subprotocol: Subprotocol) -> tuple[Mux | None, bytes]:
    """The connection and the response that opens it; None and the response that refuses it."""
    try:
        socket = WebSocket(request, subprotocol.name)
    except HandshakeRefused as refused:
        return None, refused.answer
    if isinstance(ticket, RemoteCommand):
        return _remote_command(socket, ticket, subprotocol), socket.handshake
    if subprotocol.is_tunnel:
        return Tunnel(socket), socket.handshake
    return _forward(socket, ticket, subprotocol), socket.handshake


def _remote_command(socket: WebSocket, ticket: RemoteCommand, subprotocol: Subprotocol) -> Mux:
    channels = {CHANNELS[role] for role in remotecommand.expected(ticket.wanted, subprotocol.version)}
    written = channels & {CHANNELS[role] for role in (Role.STDOUT, Role.STDERR, Role.ERROR)}
    return Channels(
        socket,
        in_base64=subprotocol.in_base64,
        version=subprotocol.version,
        readable=channels & FROM_CLIENT,
        greetings={min(written): b""},  # some clients wait for it before they send anything
    )


def _forward(socket: WebSocket, ticket: Forward, subprotocol: Subprotocol) -> Mux:
    pairs = portforward.channels(ticket.ports)
    return Channels(
        socket,
        in_base64=subprotocol.in_base64,
        version=subprotocol.version,
        readable=[pair.data for pair in pairs],
        greetings={stream: portforward.greeting(pair.port) for pair in pairs for stream in (pair.data, pair.error)},
    )
