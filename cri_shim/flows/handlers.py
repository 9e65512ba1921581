"""The configured handlers: the live objects, and the rules by which containers are dispatched to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import Handler
from cri_shim.spec.dispatch import HandlerRules, pod_handler


@dataclass(frozen=True, slots=True)
class Handlers:
    """`rules` and `live` have the same keys."""

    live: Mapping[str, Handler]
    rules: Mapping[str, HandlerRules]
    default: str

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
