"""`wasi:sockets/ip-name-lookup`: the C library's resolver, in threads, as it cannot be waited for otherwise.

It reads hosts, resolv.conf and nsswitch.conf below the root that the process has by then: see the worker. Invariant: a
lookup that nobody asks for any more ends by itself, and nothing waits for it.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import socket
import threading
from collections import deque
from typing import Final

from cri_shim.kernel import libc
from handlers.wasmtime.wasip2.descriptors import allowed
from handlers.wasmtime.wasip2.interface import Failure, Interface, methods
from handlers.wasmtime.wasip2.poll import Pollable
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.sockets_network import Address, Network, error_code, from_native, tried
from handlers.wasmtime.wasip2.waiter import READY, Interest, Source, Waiter
from handlers.wasmtime.wasip2.world import World

_THREADS: Final = 8
_IDNA: Final = codecs.lookup("idna")
"""Here, since a worker cannot load it any more when it needs it."""
_LABEL: Final = re.compile(r"[^\x00-\x20#%/:<>?@\[\\\]^`{|}\x7f]{1,63}")
"""What is no part of a host (URL standard: forbidden domain code points) is no part of a name either."""
_LONGEST_NAME: Final = 253
_CODES: Final = {
    socket.EAI_AGAIN: "temporary-resolver-failure",
    socket.EAI_MEMORY: "out-of-memory",
    socket.EAI_NONAME: "name-unresolvable",
    socket.EAI_NODATA: "name-unresolvable",
    socket.EAI_ADDRFAMILY: "name-unresolvable",
}
"""Everything else is `permanent-resolver-failure`."""


class Lookup(Resource, Source, resource=True):
    """`resolve-address-stream`."""

    def __init__(self, waiter: Waiter, name: str) -> None:
        self._waiter = waiter
        self.name = name
        self._done = tried(lambda: allowed(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)))
        self._lock = threading.Lock()
        self._found: deque[Address] = deque()
        self._failure: str | None = None
        self._over = False

    def finish(self, found: list[Address], failure: str | None = None) -> None:
        """In any thread."""
        with self._lock:
            self._found.extend(found)
            self._failure = failure
            self._over = True
            if self._done >= 0:
                os.eventfd_write(self._done, 1)

    def resolve_next_address(self) -> tuple[str, tuple[int, ...]] | None:
        """`resolve-address-stream.resolve-next-address`."""
        if not self._over:
            raise Failure("would-block")
        if self._failure is not None:
            raise Failure(self._failure)
        if not self._found:
            return None
        address = self._found.popleft()
        return address.wit[0], address.words

    def found(self) -> list[Address] | None:
        """All of them at once; None = not yet. Failure."""
        if self._failure is not None:
            raise Failure(self._failure)
        return list(self._found) if self._over else None

    def subscribe(self) -> Pollable:
        """`resolve-address-stream.subscribe`."""
        return Pollable(self._waiter, self)

    def interest(self) -> Interest:
        """`Source`."""
        return READY if self._over else Interest(((self._done, select.POLLIN),))

    def close(self) -> None:
        """`Resource`."""
        with self._lock:
            done, self._done = self._done, -1
            self._over = True
        os.close(done)


class Resolver:
    """Threads. A lookup waits until one of them is free."""

    def __init__(self) -> None:
        self._waiting: deque[Lookup] = deque()
        self._wanted = threading.Semaphore(0)
        self._threads = 0
        self._busy = 0
        self._lock = threading.Lock()

    def start(self, lookup: Lookup) -> None:
        """Look it up. Failure when there can be no thread for it."""
        with self._lock:
            self._busy += 1
            if self._busy > self._threads and self._threads < _THREADS:
                try:
                    threading.Thread(target=self._run, daemon=True, name="lookup").start()
                    self._threads += 1
                except RuntimeError:
                    if not self._threads:
                        self._busy -= 1
                        raise Failure("temporary-resolver-failure") from None
        self._waiting.append(lookup)
        self._wanted.release()

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            _look_up(self._waiting.popleft())
            with self._lock:
                self._busy -= 1


def _look_up(lookup: Lookup) -> None:
    try:
        # As bytes: as text Python would encode it once more, by a codec that it loads from a file.
        answers = socket.getaddrinfo(lookup.name.encode("ascii"), None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        lookup.finish([], _CODES.get(error.errno or 0, "permanent-resolver-failure"))
    except OSError as error:  # EAI_SYSTEM
        lookup.finish([], error_code(error))
    else:
        found = [from_native(family, address) for family, _, _, _, address in answers]
        lookup.finish([address for address in found if address.is_plain])


_resolver: Final = Resolver()
"""Of the process, which has one guest."""


def look_up(waiter: Waiter, name: str) -> Lookup:
    """Begin with it; an address is its own answer. Failure when it is no name."""
    if "\0" in name:
        raise Failure("invalid-argument")
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            packed = socket.inet_pton(family, name.removeprefix("[").removesuffix("]"))
        except OSError:
            continue
        lookup = Lookup(waiter, name)
        lookup.finish([from_native(family, (socket.inet_ntop(family, packed), 0, 0, 0))])
        return lookup
    lookup = Lookup(waiter, _checked(name))
    _resolver.start(lookup)
    return lookup


def interface(world: World) -> Interface:
    """`wasi:sockets/ip-name-lookup`."""
    libc.load_resolver()

    def resolve_addresses(_network: Network, name: str) -> Lookup:
        return look_up(world.waiter, name)

    return Interface(
        {"network": Network, "pollable": Pollable, "resolve-address-stream": Lookup},
        {
            "resolve-addresses": resolve_addresses,
            **methods("resolve-address-stream", Lookup, "resolve-next-address", "subscribe"),
        },
    )


def _checked(name: str) -> str:
    """In ASCII. Failure when it cannot be the name of a host."""
    try:
        plain = name if name.isascii() else _IDNA.encode(name)[0].decode("ascii")
    except UnicodeError:
        raise Failure("invalid-argument") from None
    labels = plain.removesuffix(".").split(".")
    if len(plain) > _LONGEST_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        raise Failure("invalid-argument")
    return plain
