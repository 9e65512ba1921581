"""The configuration of a handler of kind wasmtime."""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from cri_shim.spec.dispatch import DEFAULT_ALLOWED_ANNOTATIONS


class Isolation(enum.Enum):
    """Where a module runs."""

    IN_PROCESS = "in-process"
    """A thread of the daemon."""
    PROCESS = "process"
    """A worker process per container."""


class WasmtimeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Unknown keys and what this version cannot do are errors when the configuration is read."""

    kind: Literal["wasmtime"] = "wasmtime"
    linux_containers: str = "runc"
    """The handler of Linux containers in a pod of this handler; empty = they are refused."""
    isolation: Isolation = Isolation.IN_PROCESS
    allowed_annotations: tuple[str, ...] = DEFAULT_ALLOWED_ANNOTATIONS
    container_handlers: tuple[str, ...] = ()
    """Further handlers that a pod may name for one of its containers."""

    def __post_init__(self) -> None:
        if self.isolation is Isolation.PROCESS:
            # msgspec turns it into its own error, with the place in the configuration.
            msg = "isolation: process is not supported by this version; use isolation: in-process"
            raise ValueError(msg)
