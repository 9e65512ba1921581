"""One connection from its HTTP request to its end: check the token, agree on a protocol, run what the token stands for.

Not the sockets (`server`, `link`) and not what is run. Invariant: a token is used up by the request that names it,
whatever becomes of it, and every client gets an answer or the close that its protocol wants.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, cast

from cri_shim.kernel.pauses import late_import
from cri_shim.log import get_logger
from cri_shim.model.errors import Code, CriShimError
from cri_shim.streaming import remotecommand
from cri_shim.streaming.channels import Channels
from cri_shim.streaming.link import Link, wait_first
from cri_shim.streaming.portforward import PortForward
from cri_shim.streaming.ticket import Forward, Limits, RemoteCommand, Ticket
from cri_shim.wire import negotiation
from cri_shim.wire import remotecommand as remotecommand_words
from cri_shim.wire.http_upgrade import BadRequest, HttpUpgrade, Refusal, Request
from cri_shim.wire.mux import Mux
from cri_shim.wire.negotiation import Chosen
from cri_shim.wire.spdy import Spdy

log = get_logger()

LEFT_SECONDS: Final = 2.0
"""How long what a client has sent before it left may take to reach the pod."""
_METHODS: Final = frozenset({"GET", "POST"})
_REFUSALS: Final = {
    Code.NOT_FOUND: (HTTPStatus.NOT_FOUND, "NotFound"),
    Code.INVALID_ARGUMENT: (HTTPStatus.BAD_REQUEST, "BadRequest"),
    Code.FAILED_PRECONDITION: (HTTPStatus.BAD_REQUEST, "BadRequest"),
    Code.RESOURCE_EXHAUSTED: (HTTPStatus.TOO_MANY_REQUESTS, "TooManyRequests"),
    Code.UNAVAILABLE: (HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailable"),
}
"""HTTP status and the reason of a `metav1.Status`; anything else is an internal error."""


class Conversation:
    """What is said on one connection."""

    def __init__(self, link: Link, limits: Limits, redeem: Callable[[str, str], Ticket | None]) -> None:
        """`redeem` takes the kind and the token that a request names."""
        self._link = link
        self._limits = limits
        self._redeem = redeem
        self._http = HttpUpgrade()
        self._loop = asyncio.get_running_loop()
        self._interrupted: asyncio.Future[str] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Returns when the connection is closed."""
        try:
            request = await self._request()
            ticket = self._ticket(request)
            chosen = self._agree(request, ticket)
            mux = await self._switch(request, ticket, chosen)
        except BadRequest as bad:
            self._link.write(self._http.refuse(bad.refusal))
            self._link.close_write()
        except ConnectionError:
            pass  # it has closed the connection, or its handshake has been answered
        else:
            await self._serve(ticket, chosen, Channels(self._link, mux, self._http.trailing))
            await self._link.linger(self._limits.idle or math.inf)
            return
        await self._link.linger(self._limits.head)

    def interrupt(self, reason: str) -> None:
        """End it before its time; the client is told why."""
        if not self._interrupted.done():
            self._interrupted.set_result(reason)

    async def _request(self) -> Request:
        """Read the head. Raises BadRequest, or ConnectionError when the client leaves before it is complete."""
        complete: asyncio.Future[Request] = self._loop.create_future()

        def receive(data: bytes) -> None:
            try:
                request = self._http.receive_data(data)
            except BadRequest as bad:
                complete.set_exception(bad)
            else:
                if request is None:
                    return
                complete.set_result(request)
            self._link.receive = lambda _: None
            self._link.pause_reading()

        self._link.receive = receive
        self._link.resume_reading()
        await wait_first(complete, self._link.gone, self._interrupted, timeout=self._limits.head)
        if complete.done():
            return complete.result()
        if self._link.gone.done() or self._interrupted.done():
            raise ConnectionResetError
        raise BadRequest(Refusal(HTTPStatus.REQUEST_TIMEOUT, b"the request took too long\n"))

    def _ticket(self, request: Request) -> Ticket:
        if request.method not in _METHODS:
            raise BadRequest(Refusal(HTTPStatus.METHOD_NOT_ALLOWED, b"GET or POST\n", (("allow", "GET, POST"),)))
        _, kind, token, *more = [*request.path.split("/"), "", ""]
        ticket = None if any(more) else self._redeem(kind, token)
        if ticket is None:
            raise BadRequest(Refusal(HTTPStatus.NOT_FOUND, b"no such token: it is unknown, used, or too old\n"))
        return ticket

    def _agree(self, request: Request, ticket: Ticket) -> Chosen:
        try:
            ticket.check()
        except CriShimError as error:
            status, reason = _REFUSALS.get(error.code, (HTTPStatus.INTERNAL_SERVER_ERROR, "InternalError"))
            headers = (("retry-after", "1"),) if status in {429, 503} else ()
            body = remotecommand_words.refusal(str(error), reason, status)
            raise BadRequest(Refusal(status, body, headers)) from error
        is_command = isinstance(ticket, RemoteCommand)
        offer = negotiation.REMOTE_COMMAND if is_command else negotiation.PORT_FORWARD
        chosen = negotiation.choose(request, offer)
        if isinstance(chosen, Refusal):
            raise BadRequest(chosen)
        return chosen

    async def _switch(self, request: Request, ticket: Ticket, chosen: Chosen) -> Mux:
        """Answer 101. ConnectionError when the WebSocket handshake is refused."""
        name = chosen.subprotocol.name
        if not chosen.is_websocket:
            headers = [("connection", "Upgrade"), ("upgrade", negotiation.SPDY), (negotiation.PROTOCOL_HEADER, name)]
            self._link.write(self._http.switch(headers))
            return Spdy()
        # 2 MiB and 30 ms that only these clients need.
        over_websocket = await late_import("cri_shim.streaming.over_websocket")
        mux, answer = over_websocket.open_mux(request, ticket, chosen.subprotocol)
        self._link.write(answer)
        if mux is None:
            self._link.close_write()
            raise ConnectionAbortedError
        return cast("Mux", mux)

    async def _serve(self, ticket: Ticket, chosen: Chosen, channels: Channels) -> None:
        self._link.touch()
        self._look_idle()
        if isinstance(ticket, RemoteCommand):
            await self._remote_command(ticket, chosen, channels)
        else:
            await self._forward(ticket, chosen, channels)
        if self._timer is not None:
            self._timer.cancel()

    def _look_idle(self) -> None:
        if not self._limits.idle:
            return
        left = self._link.active + self._limits.idle - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look_idle)
        else:
            self.interrupt(f"nothing was sent or received for {self._limits.idle:g} s")

    async def _remote_command(self, ticket: RemoteCommand, chosen: Chosen, channels: Channels) -> None:
        version = chosen.subprotocol.version
        roles = remotecommand_words.expected(ticket.wanted, version)
        if chosen.is_websocket:
            ends = remotecommand.numbered(channels, roles)
        else:
            until = self._link.gone, self._interrupted
            ends = await remotecommand.collect(channels, roles, until, self._limits.creation)
        missing = sorted(role.value for role in roles - ends.keys())
        if self._interrupted.done():
            outcome = 0, self._interrupted.result()
        elif missing:
            outcome = 0, f"the client has not opened its streams: {', '.join(missing)} missing"
            log.info("session failed", error=outcome[1])
        else:
            streams = remotecommand.RemoteStreams(self._link, ends, ticket.wanted)
            outcome = await remotecommand.run(ticket.session, streams, self._interrupted)
        await remotecommand.finish(channels, ends, version, outcome)

    async def _forward(self, ticket: Forward, chosen: Chosen, channels: Channels) -> None:
        forward = PortForward(channels, ticket.connect, self._limits.creation)
        if chosen.is_websocket and not chosen.subprotocol.is_tunnel:
            forward.take_numbered(ticket.ports)
            await wait_first(forward.drained(), self._link.gone, self._interrupted)
        else:
            forward.take_opened()
            await wait_first(self._link.gone, self._interrupted)
        if not self._interrupted.done():
            await wait_first(forward.drained(), self._interrupted, timeout=LEFT_SECONDS)
        await forward.aclose()
        channels.say_goodbye()
