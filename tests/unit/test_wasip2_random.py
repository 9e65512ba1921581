"""Whatever a component calls, in whatever order: an error code or a trap, and never a defect of ours."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from handlers.wasmtime.wasip2 import (
    cli,
    clocks,
    filesystem,
    sockets_lookup,
    sockets_network,
    sockets_tcp,
    sockets_udp,
    streams,
)
from handlers.wasmtime.wasip2 import random as random_numbers
from handlers.wasmtime.wasip2.interface import Failure, Interface, Trap
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.sockets_network import Network
from handlers.wasmtime.wasip2.streams import IoError
from handlers.wasmtime.wasip2.world import Directory, new_world
from tests.support.scale import count
from tests.unit.test_wasip2 import Guest, spec
from tests.unit.test_wasip2_sockets import v4, v6

U64: Final = (0, 1, 100, 4096, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
PATHS: Final = (
    *("", ".", "..", "/", "a", "a/", "a/b", "../x", "link", "link/x", "out", "a\0b", "n" * 300),
    *("a/../a", "./a", "a//b", "é", "a/b/c/d", "/etc/passwd", "fifo"),
)
NAMES: Final = (
    "localhost",
    "127.0.0.1",
    "::1",
    "",
    ".",
    "a..b",
    "x" * 300,
    "no such",
    "[::1]",
    "\uff4cocalhost",
    "a\0b",
)
FLAGS: Final = {
    "path-flags": ("symlink-follow",),
    "open-flags": ("create", "directory", "exclusive", "truncate"),
    "descriptor-flags": ("read", "write", "file-integrity-sync", "data-integrity-sync", "requested-write-sync"),
}
BLOCKS: Final = ("block", "sync")
"""Words in the names of functions that may wait for what does not come, or take long."""


class Chaos:
    """A guest that calls anything with anything of the right type."""

    def __init__(self, seed: int, base: Path, resources: contextlib.ExitStack) -> None:
        self.random = random.Random(seed)
        self.world = new_world(Guest(spec()), resources)
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for fd in (read, write):
            resources.callback(os.close, fd)
        self.world.stdin, self.world.stdout, self.world.stderr = read, write, write
        fd = os.open(base, os.O_PATH | os.O_DIRECTORY)
        resources.callback(os.close, fd)
        self.world.directories = (Directory(fd, "/", False), Directory(fd, "/ro", True))
        interfaces: list[Interface] = [
            make(self.world)
            for make in (
                *(cli.environment, cli.stdin, cli.stdout, cli.terminal_stdin, clocks.monotonic, clocks.wall),
                *(filesystem.interface, filesystem.preopens, streams.interface, streams.errors),
                *(sockets_network.network, sockets_network.instance_network, sockets_lookup.interface),
                *(sockets_tcp.interface, sockets_tcp.creation, sockets_udp.interface, sockets_udp.creation),
                *(random_numbers.secure, random_numbers.insecure),
            )
        ]
        self.kinds = {name: kind for interface in interfaces for name, kind in interface.resources.items()}
        self.functions = {
            name: function
            for interface in interfaces
            for name, function in interface.functions.items()
            if not any(word in name for word in BLOCKS)
        }
        self.live: dict[int, Resource] = {}
        self.errors: set[str] = set()
        self.keep(Network())

    def keep(self, value: object) -> None:
        """Whatever handles there are in an answer."""
        if isinstance(value, Resource):
            self.live[self.world.table.add(value)] = value
        elif isinstance(value, tuple | list):
            for part in value:
                self.keep(part)

    def one_of(self, kind: type[Resource]) -> Resource | None:
        found = [thing for thing in self.live.values() if isinstance(thing, kind)]
        return self.random.choice(found) if found else None

    def step(self) -> None:
        """One call, or one handle dropped."""
        if len(self.live) > 60 or (self.live and self.random.random() < 0.05):
            number = self.random.choice(list(self.live))
            del self.live[number]
            self.world.table.drop(number)
            return
        name = self.random.choice(list(self.functions))
        arguments = self.arguments(name)
        if arguments is None:
            return
        try:
            self.keep(self.functions[name](*arguments))
        except Failure as failure:
            self.told(failure.value)
        except Trap:
            self.errors.add("trap")

    def told(self, value: Any) -> None:
        if isinstance(value, tuple):
            self.errors.add(value[0])
            if isinstance(value[1], IoError):
                self.keep(value[1])
        else:
            assert isinstance(value, str), value
            self.errors.add(value)

    def arguments(self, name: str) -> list[Any] | None:
        """By what the function calls them; None when there is no handle to call it with."""
        made: list[Any] = []
        if name.startswith("[method]"):
            this = self.one_of(self.kinds[name[len("[method]") :].partition(".")[0]])
            if this is None:
                return None
            made.append(this)
        code = self.functions[name].__code__ if hasattr(self.functions[name], "__code__") else None
        names = code.co_varnames[: code.co_argcount][len(made) :] if code is not None else ()
        for parameter in names:
            value = self.value(parameter, name)
            if value is None:
                return None
            made.append(value[0])
        return made

    def value(self, parameter: str, function: str) -> tuple[Any] | None:
        choose = self.random.choice
        handles = {"_network": Network, "target": filesystem.Descriptor, "other": filesystem.Descriptor}
        handles |= {"source": streams.InputStream, "error": IoError}
        if parameter in handles and "symlink" not in function:
            thing = self.one_of(handles[parameter])
            return None if thing is None else (thing,)
        plain: dict[str, Callable[[], Any]] = {
            "value": lambda: self.address() if "bind" in function or "connect" in function else self.number(function),
            "data": lambda: bytes(choice_of_size(self.random)),
            "name": lambda: choose(NAMES),
            "family": lambda: choose(("ipv4", "ipv6")),
            "how": lambda: choose(("receive", "send", "both")) if "shutdown" in function else self.flags("open-flags"),
            "flags": lambda: self.flags("path-flags"),
            "follow": lambda: self.flags("path-flags"),
            "wanted": lambda: self.flags("descriptor-flags"),
            "advice": lambda: choose(("normal", "sequential", "random", "will-need", "dont-need", "no-reuse")),
            "accessed": self.moment,
            "modified": self.moment,
            "datagrams": lambda: [
                {"data": bytes(choice_of_size(self.random)), "remote-address": choose((None, self.address()))}
                for _ in range(choose((0, 1, 2, 17)))
            ],
        }
        if parameter in plain:
            return (plain[parameter](),)
        if "path" in parameter or parameter == "target":
            return (choose(PATHS),)
        return (choose(U64),)

    def number(self, function: str) -> Any:
        if "stream" in function:
            return self.random.choice((None, self.address()))
        if "enabled" in function:
            return self.random.choice((True, False))
        limit = 255 if "hop" in function else (1 << 32) - 1 if "count" in function else (1 << 64) - 1
        return min(self.random.choice(U64), limit)

    def flags(self, kind: str) -> frozenset[str]:
        return frozenset(flag for flag in FLAGS[kind] if self.random.random() < 0.3)

    def moment(self) -> tuple[str, Any]:
        at = {"seconds": self.random.choice(U64), "nanoseconds": self.random.choice((0, 999_999_999))}
        return self.random.choice((("no-change", None), ("now", None), ("timestamp", at)))

    def address(self) -> Any:
        """Of this machine, or of nobody."""
        known = [thing for thing in self.live.values() if hasattr(thing, "local_address")]
        if known and self.random.random() < 0.5:
            with contextlib.suppress(Failure):
                return self.random.choice(known).local_address()
        return self.random.choice(
            (
                v4(),
                v4(port=1),
                v6(),
                v6(port=1),
                v4("0.0.0.0"),
                v4("224.0.0.1", 9),
                v6("::ffff:127.0.0.1", 9),
                v6("ff02::1"),
            )
        )


def choice_of_size(source: random.Random) -> int:
    return source.choice((0, 1, 10, 100))


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "given"
    place.mkdir()
    (place / "a").mkdir()
    (place / "a" / "b").write_text("text")
    os.symlink("a", place / "link")
    os.symlink("../outside", place / "out")
    os.mkfifo(place / "fifo")
    (tmp_path / "outside").write_text("outside")
    yield place
    assert (tmp_path / "outside").read_text() == "outside"
    assert sorted(os.listdir(tmp_path)) == ["given", "outside"]


@pytest.mark.parametrize("seed", range(count(50, 5)))
def test_no_call_is_a_defect(seed: int, base: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as resources:
        chaos = Chaos(seed, base, resources)
        for _ in range(3000):
            chaos.step()
        assert len(chaos.errors) > 8, chaos.errors
    assert len(os.listdir("/proc/self/fd")) <= before
