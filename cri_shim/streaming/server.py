"""The listener of exec, attach and port-forward: gives out one-time URLs and takes the connections to them.

Not what happens on a connection (`conversation`, loaded with the first URL). Invariant: it holds at most MAX_WAITING
connections that have not shown a token, and when it has stopped no connection and no session is left.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cri_shim.kernel.pauses import late_import
from cri_shim.log import get_logger
from cri_shim.model.errors import FailedPrecondition, ResourceExhausted
from cri_shim.model.streams import Connect, Session, Wanted
from cri_shim.streaming.hangup import HangupWatch
from cri_shim.streaming.link import Link
from cri_shim.streaming.ticket import ATTACH, EXEC, PORT_FORWARD, Forward, Limits, RemoteCommand, Ticket
from cri_shim.streaming.tls import Certificate
from cri_shim.streaming.tokens import Tokens

if TYPE_CHECKING:
    from cri_shim.streaming.conversation import Conversation

log = get_logger()

BACKLOG: Final = 1024
MAX_WAITING: Final = 128
"""Connections that have not shown a token yet; one more, and the oldest of them is cut."""
MAX_SESSIONS: Final = 2048
STOP_SECONDS: Final = 10.0
"""How long sessions and their clients may take to end when the daemon stops."""
_RETRY_SECONDS: Final = 1.0
"""After a failed accept: no descriptor or no memory was free."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`streaming` in the configuration."""

    address: str = "127.0.0.1"
    port: int = 0
    certificate: Certificate | None = None
    limits: Limits = field(default_factory=Limits)


class Server:
    """The daemon's one streaming server."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._tokens: Tokens[Ticket] = Tokens(clock)
        self._waiting: dict[asyncio.Task[None], None] = {}
        """Connections that have not shown a token, the oldest first."""
        self._sessions: dict[asyncio.Task[None], Conversation] = {}
        self._conversations: asyncio.Future[Any] | None = None
        """The module, once the first URL has been given out."""

    async def start(self) -> None:
        """Listen. Raises FailedPrecondition when the address cannot be used."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        if settings.certificate is not None:
            await asyncio.to_thread(settings.certificate.context)
        try:
            found = await loop.getaddrinfo(
                settings.address, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, _, _, _, address = found[0]
            self._listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        except OSError as error:
            msg = f"cannot listen on {settings.address}:{settings.port} for streaming: {error.strerror or error}"
            raise FailedPrecondition(msg, hint="set another streaming.address or streaming.port") from error
        self._listener.setblocking(False)
        self._hangups = HangupWatch(loop)
        self._accepting = asyncio.create_task(self._accept())
        if not _is_loopback(self._listener) and settings.certificate is None:
            log.warning("streaming is open to the network without TLS", address=settings.address)
        log.info("streaming server listens", url=self._base())

    def exec_url(self, wanted: Wanted, session: Session) -> str:
        """A URL for one exec. ResourceExhausted when too many wait for their client, or run."""
        return self._url(RemoteCommand(EXEC, _nothing, wanted, session))

    def attach_url(self, wanted: Wanted, session: Session, check: Callable[[], None]) -> str:
        """Likewise for an attach."""
        return self._url(RemoteCommand(ATTACH, check, wanted, session))

    def port_forward_url(self, ports: tuple[int, ...], connect: Connect, check: Callable[[], None]) -> str:
        """Likewise for a port-forward."""
        return self._url(Forward(PORT_FORWARD, check, ports, connect))

    async def stop(self) -> None:
        """Take no more connections and end all sessions; their clients are told why."""
        self._accepting.cancel()
        self._listener.close()
        for task in self._waiting:
            task.cancel()
        for conversation in self._sessions.values():
            conversation.interrupt("the daemon is stopping")
        connections = {*self._waiting, *self._sessions}
        if connections:
            _, left = await asyncio.wait(connections, timeout=STOP_SECONDS)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        self._hangups.close()

    def _url(self, ticket: Ticket) -> str:
        if len(self._sessions) >= MAX_SESSIONS:
            msg = f"{MAX_SESSIONS} streaming sessions are open"
            raise ResourceExhausted(msg)
        if self._conversations is None:
            # Before the client comes: 6 MiB and 60 ms, that a node without exec does without.
            self._conversations = asyncio.ensure_future(late_import("cri_shim.streaming.conversation"))
        return f"{self._base()}/{ticket.kind}/{self._tokens.issue(ticket)}"

    def _base(self) -> str:
        host, port = self._listener.getsockname()[:2]
        if ipaddress.ip_address(host).is_unspecified:
            host = "::1" if self._listener.family == socket.AF_INET6 else "127.0.0.1"
        elif self._settings.certificate is not None:
            host = self._settings.address  # the name that is in the certificate
        scheme = "http" if self._settings.certificate is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                log.warning("cannot accept a streaming connection", error=error.strerror)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if len(self._waiting) >= MAX_WAITING:
                oldest = next(iter(self._waiting))
                del self._waiting[oldest]
                oldest.cancel()
            task = asyncio.create_task(self._converse(connection))
            self._waiting[task] = None
            task.add_done_callback(self._ended)
            await asyncio.sleep(0)  # `sock_accept` does not wait while clients do: a crowd would all come in one turn

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._waiting.pop(task, None)
        self._sessions.pop(task, None)

    async def _converse(self, connection: socket.socket) -> None:
        """One connection to its end."""
        link = None
        try:
            link = await self._link(connection)
            await self._conversation(link)
        except (OSError, TimeoutError) as error:
            log.debug("streaming connection broke", error=str(error))
        except Exception as error:
            log.error("streaming connection failed", exc_info=error)
        finally:
            if link is None:
                connection.close()
            else:
                link.abort()

    async def _link(self, connection: socket.socket) -> Link:
        """The connection behind its TLS handshake."""
        certificate = self._settings.certificate
        context = None if certificate is None else await asyncio.to_thread(certificate.context)
        _, link = await asyncio.get_running_loop().connect_accepted_socket(
            lambda: Link(self._hangups),
            connection,
            ssl=context,
            ssl_handshake_timeout=None if context is None else self._settings.limits.head,
        )
        return link

    async def _conversation(self, link: Link) -> None:
        task = asyncio.current_task()
        if task is None or self._conversations is None:
            return  # no URL has been given out: there is nothing to be had here

        def redeem(kind: str, token: str) -> Ticket | None:
            ticket = self._tokens.redeem(token)
            if ticket is None or ticket.kind != kind:
                return None
            self._waiting.pop(task, None)
            self._sessions[task] = conversation
            return ticket

        module = await asyncio.shield(self._conversations)
        conversation: Conversation = module.Conversation(link, self._settings.limits, redeem)
        await conversation.run()


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _nothing() -> None:
    pass
