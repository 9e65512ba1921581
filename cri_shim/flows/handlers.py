"""The configured handlers: the live objects, and the rules by which containers are dispatched to them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from cri_shim.log import get_logger
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import Handler
from cri_shim.spec.dispatch import HandlerRules, pod_handler
from cri_shim.spec.namespaces import USERNS

log = get_logger()


@dataclass(frozen=True, slots=True)
class Handlers:
    """`rules` and `live` have the same keys."""

    live: Mapping[str, Handler]
    rules: Mapping[str, HandlerRules]
    default: str
    probed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the features of all handlers are known."""

    async def probe(self) -> None:
        """Ask every runtime what it can do; one that does not answer offers nothing."""
        live = self.live.values()
        results = await asyncio.gather(*(handler.probe() for handler in live), return_exceptions=True)
        for handler, result in zip(live, results, strict=True):
            if isinstance(result, Exception):
                log.warning("cannot learn the features of a handler", handler=handler.name, error=str(result))
        self.probed.set()

    async def require_user_namespaces(self, name: str) -> None:
        """FailedPrecondition where containers of this handler cannot be in a user namespace of their pod."""
        handler = self.get(name)
        await handler.probe()
        if why := handler.features.no_user_namespaces:
            msg = f"{USERNS}: handler {name!r} is not able to: {why}"
            raise FailedPrecondition(msg)

    def for_pod(self, asked: str) -> HandlerRules:
        """Rules of the pod's handler; NotFound, naming what there is, for an unknown one."""
        return pod_handler(self.rules, self.default, asked)

    def get(self, name: str) -> Handler:
        """The handler of a container that exists."""
        handler = self.live.get(name)
        if handler is None:
            msg = f"handler {name!r} is no longer configured"
            raise FailedPrecondition(msg, hint="configure it again, or remove the container")
        return handler
