"""Where requests are answered: places, each a thread that gives one request after the other an instance of its own.

Not the connections (`http_server`). Invariant: nothing of a request is left for the next one in the same place, and
whatever it does, its client gets an answer or sees that there is none, and the log says what went wrong.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Final

import wasmtime
from wasmtime import component

from handlers.wasmtime import epoch
from handlers.wasmtime.guest_spec import GuestSpec
from handlers.wasmtime.sockets import Stopped
from handlers.wasmtime.wasip2.calls import Signature, Signatures, call, signature_of
from handlers.wasmtime.wasip2.http_bodies import IncomingBody
from handlers.wasmtime.wasip2.http_connection import Visit
from handlers.wasmtime.wasip2.http_exchange import Exchange
from handlers.wasmtime.wasip2.http_messages import IncomingRequest, ResponseOutparam
from handlers.wasmtime.wasip2.linker import link
from handlers.wasmtime.wasip2.resources import Table
from handlers.wasmtime.wasip2.world import World

PLACES: Final = 64
"""Requests that are being answered at once; further ones wait."""
_HANDLE: Final = "handle"


@dataclass(slots=True)
class Service:
    """What is served. `say` puts a line into the container's log."""

    world: World
    engine: wasmtime.Engine
    program: component.Component
    export: str
    is_stopping: Callable[[], bool]
    say: Callable[[str], None] = print
    signatures: Signatures = field(default_factory=dict)
    handle: Signature | None = None
    _index: component.ExportIndex | None = None

    def index(self) -> component.ExportIndex:
        """Where an instance has its function `handle`."""
        if self._index is None:
            interface = self.program.get_export_index(self.export)
            self._index = self.program.get_export_index(_HANDLE, interface)
        if self._index is None:
            msg = f"{self.export} has no function {_HANDLE}"
            raise TypeError(msg)
        return self._index


class _Place:
    """`HostedGuest` of whatever instance is in it."""

    def __init__(self, service: Service, resources: ExitStack) -> None:
        self.spec: GuestSpec = service.world.guest.spec
        self._service = service
        self.waiter = service.world.waiter.another()
        self._world = replace(service.world, guest=self, waiter=self.waiter, table=Table())
        self._linker = link(self._world, service.program, service.engine, resources, signatures=service.signatures)
        self._defect = ""
        self._left: int | None = None
        self._exchange: Exchange | None = None
        self._number = next(_numbers)
        _places[self._number] = self
        resources.callback(_places.pop, self._number)

    def goes_on(self) -> bool:
        """Whether its instance is to, which computes."""
        return not self._service.is_stopping() and self._exchange is not None and self._exchange.is_wanted

    def resting(self) -> AbstractContextManager[None]:
        """`HostedGuest`."""
        return self._service.world.guest.resting()

    def leave(self, code: int) -> None:
        """`HostedGuest`: the end of this instance, not of the container."""
        self._left = code

    def fail(self, error: Exception) -> None:
        """`HostedGuest`."""
        self._defect = f"internal error in a host function: {type(error).__name__}: {error}"

    def answer(self, exchange: Exchange) -> bool:
        """Have it answered: whether the connection is good for another request. Stopped when the guest is to stop."""
        self._defect, self._left, self._exchange = "", None, exchange
        text = self._run(exchange)
        usable = exchange.conclude(self.waiter)
        for complaint in (exchange.complaint, text):
            if complaint:
                self._service.say(f"wasi:http: {exchange.head.method} {exchange.head.target}: {complaint}")
        return usable

    def _run(self, exchange: Exchange) -> str:
        """What ended the instance, if it did not end by itself."""
        world, common = self._world, self._service.world
        world.stdin, world.stdout, world.stderr = common.stdin, common.stdout, common.stderr
        world.directories, world.table = common.directories, Table()
        store = wasmtime.Store(self._service.engine)
        epoch.watch(store, _AT_EPOCH, self._number)
        self.waiter.client = exchange
        try:
            self._look()  # after the deadline has been set: one of the two sees that it is to end
            if not exchange.is_wanted:
                return ""
            handle = self._instance(store)
            request = IncomingRequest(self.waiter, exchange.head, IncomingBody(self.waiter, exchange.body))
            call(world.table, store, handle, request, ResponseOutparam(exchange), signature=self._service.handle)
            exchange.returned()
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001  the server goes on, whatever ended the instance
            self._look()
            return self._end(error) if exchange.is_wanted else ""
        finally:
            self.waiter.client = None
            store.close()
            world.table.close()
        return ""

    def _look(self) -> None:
        """Stopped when the guest is to stop."""
        if self._service.is_stopping():
            raise Stopped

    def _instance(self, store: wasmtime.Store) -> component.Func:
        service = self._service
        handle = self._linker.instantiate(store, service.program).get_func(store, service.index())
        if handle is None:
            msg = f"{service.export} has no function {_HANDLE}"
            raise TypeError(msg)
        if service.handle is None:
            service.handle = signature_of(handle.type(store))
        return handle

    def _end(self, error: Exception) -> str:
        if self._left is not None:
            return f"the component has left with code {self._left}" if self._left else ""
        return self._defect or str(error).strip() or type(error).__name__


class Places:
    """Made as they are needed. `hand_over` is called in one thread: that which starts theirs."""

    def __init__(self, service: Service, resources: ExitStack, start: Callable[[Callable[[], None]], None]) -> None:
        """The first one is made here, to see whether the component can be linked at all: FailedPrecondition."""
        self._service = service
        self._resources = resources
        self._start = start
        self._queue: queue.SimpleQueue[Visit | None] = queue.SimpleQueue()
        self._free = [_Place(service, resources)]
        self._threads = 0
        self._idle = 0
        self._changed = threading.Condition()

    def hand_over(self, visit: Visit) -> None:
        """Have it answered, now or when there is a place."""
        with self._changed:
            self._idle -= 1  # below 0: requests that wait
            more = self._idle < 0 and self._threads < PLACES
            if more:
                self._threads += 1
                self._idle += 1
        self._queue.put(visit)
        if more:
            self._start(self._serve)

    def close(self) -> None:
        """There are no more requests: returns when all places are empty, which those of a stopped guest soon are."""
        with self._changed:
            for _ in range(self._threads):
                self._queue.put(None)
            while self._threads:
                self._changed.wait()

    def _serve(self) -> None:
        try:
            place = self._free.pop() if self._free else _Place(self._service, self._resources)
            while (visit := self._queue.get()) is not None:
                usable = self._answer(place, visit)
                with self._changed:
                    self._idle += 1
                visit.end(usable)
        except Stopped:
            pass
        finally:
            with self._changed:
                self._threads -= 1
                self._changed.notify_all()

    def _answer(self, place: _Place, visit: Visit) -> bool:
        """All that the client asks for soon, unless others wait: whether the connection is good for more."""
        try:
            while place.answer(visit.exchange):
                if self._idle < 0 or not visit.goes_on(place.waiter):
                    return True
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001  the connection has to be given back, whatever it is
            self._service.say(f"wasi:http: internal error: {type(error).__name__}: {error}")
        return False


def _goes_on(number: int) -> bool:
    return _places[number].goes_on()


_places: Final[dict[int, _Place]] = {}
_numbers: Final = itertools.count(1)
_AT_EPOCH: Final = epoch.callback(_goes_on)
