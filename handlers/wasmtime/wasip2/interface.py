"""What a host interface is: its resources and functions by their WIT names, and how a function says that it failed.

Values only; how they get to the engine is in `linker` and `values`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from handlers.wasmtime.wasip2.resources import Resource

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Interface:
    """Names as the binary has them, without a version: `pollable`, `poll`, `[method]pollable.ready`."""

    resources: Mapping[str, type[Resource]] = field(default_factory=dict)
    functions: Mapping[str, Function] = field(default_factory=dict)


class Failure(Exception):
    """The `err` of a function's result, as a value: see `values`."""

    def __init__(self, value: object = None) -> None:
        super().__init__(value)
        self.value = value


class Trap(Exception):
    """The guest did what it must not: it ends, with these words."""


class Exited(Exception):
    """The guest ends with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def methods(resource: str, cls: type[Resource], *names: str) -> dict[str, Function]:
    """The methods of a resource, by their names in WIT; in Python they have underscores."""
    return {f"[method]{resource}.{name}": getattr(cls, name.replace("-", "_")) for name in names}
