"""NetworkReady: what the configuration says at once, and what the plugins say about themselves (CNI 1.1, STATUS).

Plugins are programs: they are asked in the background, when somebody wants to know and the last answer is older than
`INTERVAL` seconds. Invariant: an answer never waits for a plugin, and at most one question is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from cri_shim.adapters.network import Network, NetworkStatus
from cri_shim.log import get_logger

INTERVAL = 5.0
FIRST_SECONDS = 1.0
"""How long the start of the daemon waits for the first answer."""

_NOT_ASKED = NetworkStatus(
    ready=False, reason="NetworkPluginNotReady", message="the CNI plugins have not yet said whether they are ready"
)

log = get_logger()


@dataclass(slots=True)
class NetworkWatch:
    """Keeps the last answer. A new configuration leaves it as it is until the new plugins have answered."""

    network: Network
    _told: NetworkStatus = _NOT_ASKED
    _asked_at: float = float("-inf")
    _asking: asyncio.Task[None] | None = field(default=None)

    async def start(self) -> None:
        """Ask for the first time: a client that comes later finds the answer, unless a plugin takes its time."""
        if self.network.status().ready and self.network.has_status():
            await asyncio.wait([self._ask_if_due()], timeout=FIRST_SECONDS)

    def status(self) -> NetworkStatus:
        """The condition now, as far as it is known."""
        configured = self.network.status()
        if not configured.ready or not self.network.has_status():
            return configured
        self._ask_if_due()
        return self._told

    async def aclose(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._asking

    def _ask_if_due(self) -> asyncio.Task[None]:
        now = asyncio.get_running_loop().time()
        if self._asking is None or (self._asking.done() and now >= self._asked_at + INTERVAL):
            self._asked_at = now
            self._asking = asyncio.create_task(self._ask())
        return self._asking

    async def _ask(self) -> None:
        told = await self.network.ask()
        if told != self._told:
            log.info("the network's plugins have answered", ready=told.ready, message=told.message)
        self._told = told
