"""Which interface of WASI 0.2 is where, and a linker with those that a component imports.

Not the interfaces. A component has the names of the version that it was built for, any of 0.2; each is served as it is
asked for. Invariant: what a component imports and we have not is refused by name, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Final

import wasmtime
from wasmtime import component

from cri_shim.model.errors import FailedPrecondition
from handlers.wasmtime.wasip2 import (
    cli,
    clocks,
    filesystem,
    poll,
    random,
    sockets_lookup,
    sockets_network,
    sockets_tcp,
    sockets_udp,
    streams,
)
from handlers.wasmtime.wasip2.calls import Definer
from handlers.wasmtime.wasip2.interface import Interface
from handlers.wasmtime.wasip2.world import World

_VERSION: Final = "0.2."


def _http_types(world: World) -> Interface:
    from handlers.wasmtime.wasip2.http_types import interface  # noqa: PLC0415  for those who need it

    return interface(world)


def _http_outgoing(world: World) -> Interface:
    from handlers.wasmtime.wasip2.http_outgoing import interface  # noqa: PLC0415  likewise

    return interface(world)


_INTERFACES: Final[Mapping[str, Callable[[World], Interface]]] = {
    "wasi:cli/environment": cli.environment,
    "wasi:cli/exit": cli.leaving,
    "wasi:cli/stderr": cli.stderr,
    "wasi:cli/stdin": cli.stdin,
    "wasi:cli/stdout": cli.stdout,
    "wasi:cli/terminal-input": cli.terminal_input,
    "wasi:cli/terminal-output": cli.terminal_output,
    "wasi:cli/terminal-stderr": cli.terminal_stderr,
    "wasi:cli/terminal-stdin": cli.terminal_stdin,
    "wasi:cli/terminal-stdout": cli.terminal_stdout,
    "wasi:clocks/monotonic-clock": clocks.monotonic,
    "wasi:clocks/wall-clock": clocks.wall,
    "wasi:filesystem/preopens": filesystem.preopens,
    "wasi:filesystem/types": filesystem.interface,
    "wasi:http/outgoing-handler": _http_outgoing,
    "wasi:http/types": _http_types,
    "wasi:io/error": streams.errors,
    "wasi:io/poll": poll.interface,
    "wasi:io/streams": streams.interface,
    "wasi:random/insecure": random.insecure,
    "wasi:random/insecure-seed": random.insecure_seed,
    "wasi:random/random": random.secure,
    "wasi:sockets/instance-network": sockets_network.instance_network,
    "wasi:sockets/ip-name-lookup": sockets_lookup.interface,
    "wasi:sockets/network": sockets_network.network,
    "wasi:sockets/tcp": sockets_tcp.interface,
    "wasi:sockets/tcp-create-socket": sockets_tcp.creation,
    "wasi:sockets/udp": sockets_udp.interface,
    "wasi:sockets/udp-create-socket": sockets_udp.creation,
}


def link(
    world: World,
    program: component.Component,
    engine: wasmtime.Engine,
    resources: ExitStack,
    find: Callable[[str], Interface | None] | None = None,
) -> component.Linker:
    """A linker with all that the component imports. FailedPrecondition names what we have not.

    `find` gives the interface of a name; by default ours.
    """
    linker = component.Linker(engine)
    definer = Definer(world, resources)
    with linker.root() as root:
        for name, extern in program.type.imports(engine).items():
            wanted = extern.ty
            interface = find(name) if find is not None else find_interface(world, name)
            if not isinstance(wanted, component.ComponentInstanceType) or interface is None:
                raise not_provided(name)
            with root.add_instance(name) as instance:
                _define(definer, instance, interface, name, wanted.exports(engine))
    return linker


def find_interface(world: World, name: str) -> Interface | None:
    """The interface of that name, with a version; None = we have none such."""
    return _INTERFACES[name.partition("@")[0]](world) if is_known(name) else None


def is_known(name: str) -> bool:
    """Whether there is one. Without the network the engine has the same."""
    base, _, version = name.partition("@")
    return base in _INTERFACES and version.startswith(_VERSION)


def not_provided(name: str) -> FailedPrecondition:
    """The error of an import that nobody serves."""
    msg = f"the component imports {name}, which is not provided"
    return FailedPrecondition(msg, hint="docs/conformance.md lists what a component may import")


def _define(
    definer: Definer,
    instance: component.LinkerInstance,
    interface: Interface,
    name: str,
    wanted: Mapping[str, Any],
) -> None:
    for item, extern in wanted.items():
        wit = extern.ty
        if isinstance(wit, component.FuncType):
            function = interface.functions.get(item)
            if function is None:
                raise not_provided(f"{name} {item}")
            definer.function(instance, item, function)
        elif isinstance(wit, component.ResourceType):
            resource = interface.resources.get(item)
            if resource is None:
                raise not_provided(f"{name} {item}")
            definer.resource(instance, item, resource)
