"""Finding the code behind `handlers:` in the configuration, and checking its options.

Only the kinds that the configuration names are imported; kinds of others are found by the entry-point group
`cri_shim.handlers`. Part of the composition root. Invariant: what this returns can be made without a further question.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import msgspec

from cri_shim.adapters.context import HandlerContext
from cri_shim.config import Config, Origins, decode
from cri_shim.model.errors import InvalidArgument
from cri_shim.model.handler import Handler, Kind
from cri_shim.spec.dispatch import DEFAULT_ALLOWED_ANNOTATIONS, HandlerRules, WasmMode

ENTRY_POINTS = "cri_shim.handlers"
_OWN = {"oci": "handlers.oci", "wasmtime": "handlers.wasmtime.kind"}


class HandlerModule(Protocol):
    """What a handler module offers."""

    OPTIONS: type[msgspec.Struct]
    KIND: Kind

    def make(self, name: str, options: Any, context: HandlerContext) -> Handler:
        """A handler, ready; raises CriShimError when the node lacks what it needs."""
        ...


@dataclass(frozen=True, slots=True)
class HandlerOptions:
    """A configured handler that has not been made yet."""

    name: str
    module: HandlerModule
    options: msgspec.Struct
    rules: HandlerRules

    def make(self, context: HandlerContext) -> Handler:
        """Make it."""
        return self.module.make(self.name, self.options, context)


def handler_options(config: Config, origins: Origins) -> dict[str, HandlerOptions]:
    """Every configured handler, or the built-in ones: runc and crun if they are on PATH, wasm always."""
    sections = config.handlers or _built_in()
    result = {name: _one(name, section, origins) for name, section in sections.items()}
    if config.default_handler and config.default_handler not in result:
        where = origins.get(("default_handler",), "configuration")
        msg = f"{where}: default_handler {config.default_handler!r} is not configured"
        raise InvalidArgument(msg, hint=f"there are: {', '.join(sorted(result))}")
    return result


def default_handler(config: Config, options: Mapping[str, HandlerOptions]) -> str:
    """The configured one, else runc, else wasm, else the first."""
    for name in (config.default_handler, "runc", "wasm"):
        if name in options:
            return name
    return next(iter(options))


def _built_in() -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    if shutil.which("runc"):
        sections["runc"] = {"kind": "oci", "path": "runc"}
    if shutil.which("crun"):
        sections["crun"] = {"kind": "oci", "path": "crun", "wasm": "executor", "min_memory": 512_000}
    linux = next(iter(sections), "")
    sections["wasm"] = {"kind": "wasmtime", "linux_containers": linux}
    return sections


def _one(name: str, section: Mapping[str, Any], origins: Origins) -> HandlerOptions:
    where = origins.get(("handlers", name), "configuration")
    kind = section.get("kind") if isinstance(section, dict) else None
    if not isinstance(kind, str):
        msg = f"{where}: handlers.{name} has no kind"
        raise InvalidArgument(msg, hint=f"known kinds: {', '.join(sorted(_OWN))}")
    module = _module(kind, f"{where}: handlers.{name}")
    options = decode(section, module.OPTIONS, origins, ("handlers", name))
    rules = HandlerRules(
        name=name,
        kind=module.KIND,
        wasm=WasmMode(getattr(options, "wasm", "off")),
        linux_containers=getattr(options, "linux_containers", ""),
        container_handlers=tuple(getattr(options, "container_handlers", ())),
        allowed_annotations=tuple(getattr(options, "allowed_annotations", DEFAULT_ALLOWED_ANNOTATIONS)),
        default_env=dict(getattr(options, "default_env", {})),
        default_sysctls=dict(getattr(options, "default_sysctls", {})),
    )
    return HandlerOptions(name, module, options, rules)


def _module(kind: str, where: str) -> HandlerModule:
    own = _OWN.get(kind)
    if own is not None:
        return cast("HandlerModule", importlib.import_module(own))
    from importlib.metadata import entry_points  # noqa: PLC0415 (20 ms, and only for kinds that are not ours)

    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if kind not in found:
        msg = f"{where}: unknown kind {kind!r}"
        raise InvalidArgument(msg, hint=f"known kinds: {', '.join(sorted({*_OWN, *found}))}")
    return cast("HandlerModule", found[kind].load())
