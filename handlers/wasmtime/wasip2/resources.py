"""Host resources: what a component has handles of.

Not the handles, which the engine counts. Invariant: an object is in the table exactly while a handle that owns it is in
the guest's hands; when the last one is dropped it is closed.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import ClassVar, Final

from handlers.wasmtime.sockets import Stopped

_types: Final = itertools.count(1)


class Resource:
    """One object behind a handle. A WIT resource is a class declared with `resource=True`, and all its subclasses."""

    TYPE: ClassVar[int] = 0
    """What tells the resource from others, to the engine."""

    def __init_subclass__(cls, *, resource: bool = False) -> None:
        if resource:
            cls.TYPE = next(_types)

    def close(self) -> None:
        """The guest has dropped it, or has ended."""


class Table:
    """The objects that a guest owns, by the number that the engine keeps for each."""

    def __init__(self) -> None:
        self._objects: dict[int, Resource] = {}
        self._numbers = itertools.count(1)

    def add(self, resource: Resource) -> int:
        """The guest has it from now on."""
        number = next(self._numbers)
        self._objects[number] = resource
        return number

    def get(self, number: int) -> Resource:
        """One that it lends."""
        return self._objects[number]

    def take(self, number: int) -> Resource:
        """One that it gives back."""
        return self._objects.pop(number)

    def drop(self, number: int) -> None:
        """One that it is done with."""
        self._objects.pop(number).close()

    def __len__(self) -> int:
        return len(self._objects)

    def close(self) -> None:
        """The guest has ended: what came last goes first."""
        while self._objects:
            with contextlib.suppress(Stopped):
                self._objects.popitem()[1].close()
