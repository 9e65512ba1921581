"""The configuration of a handler of kind wasmtime."""

from __future__ import annotations

from typing import Literal

import msgspec

from cri_shim.spec.dispatch import DEFAULT_ALLOWED_ANNOTATIONS
from handlers.wasmtime.placement import Isolation


class WasmtimeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Unknown keys are errors when the configuration is read."""

    kind: Literal["wasmtime"] = "wasmtime"
    linux_containers: str = "runc"
    """The handler of Linux containers in a pod of this handler; empty = they are refused."""
    isolation: Isolation = Isolation.IN_PROCESS
    allowed_annotations: tuple[str, ...] = DEFAULT_ALLOWED_ANNOTATIONS
    container_handlers: tuple[str, ...] = ()
    """Further handlers that a pod may name for one of its containers."""
