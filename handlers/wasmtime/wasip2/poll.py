"""`wasi:io/poll`. What is waited for, and how, is in `waiter`."""

from __future__ import annotations

from handlers.wasmtime.wasip2.interface import Interface, Trap, methods
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.waiter import Source, Waiter
from handlers.wasmtime.wasip2.world import World


class Pollable(Resource, resource=True):
    """`pollable`."""

    def __init__(self, waiter: Waiter, source: Source) -> None:
        self._waiter = waiter
        self.source = source

    def ready(self) -> bool:
        """`pollable.ready`."""
        return bool(self._waiter.look((self.source,)))

    def block(self) -> None:
        """`pollable.block`."""
        self._waiter.wait((self.source,))


def interface(world: World) -> Interface:
    """`wasi:io/poll`."""

    def poll(pollables: list[Pollable]) -> list[int]:
        if not pollables:
            msg = "wasi:io/poll: poll was called without a pollable"
            raise Trap(msg)
        return world.waiter.wait([pollable.source for pollable in pollables])

    return Interface({"pollable": Pollable}, {"poll": poll, **methods("pollable", Pollable, "ready", "block")})
