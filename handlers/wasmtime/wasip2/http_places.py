"""Where requests are answered: places, each a thread that gives one request after the other an instance of its own.

Not the connections (`http_server`). Invariant: nothing of a request is left for the next one in the same place, and
whatever it does, its client gets an answer or sees that there is none, and the log says what went wrong.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import wasmtime
from wasmtime import component

from cri_shim.model.errors import ResourceExhausted
from handlers.wasmtime import epoch
from handlers.wasmtime.guest import Guest
from handlers.wasmtime.sockets import Stopped
from handlers.wasmtime.wasip2.calls import Signature, call, signature_of
from handlers.wasmtime.wasip2.http_bodies import IncomingBody
from handlers.wasmtime.wasip2.http_connection import Visit
from handlers.wasmtime.wasip2.http_exchange import Exchange
from handlers.wasmtime.wasip2.http_messages import IncomingRequest, ResponseOutparam
from handlers.wasmtime.wasip2.linker import link
from handlers.wasmtime.wasip2.resources import Table
from handlers.wasmtime.wasip2.world import World

PLACES: Final = 64
"""Requests that are being answered at once; further ones wait."""
_SPARE: Final = 2.0
"""Seconds after which a place that nobody needs is given up: it has 70 KiB, most of them stack."""
_HANDLE: Final = "handle"


class Service:
    """What is served. `say` puts a line into the container's log."""

    def __init__(
        self, guest: Guest, world: World, program: component.Component, export: str, resources: ExitStack
    ) -> None:
        """FailedPrecondition when it cannot be linked."""
        self.guest = guest
        self.world = world
        self.say: Callable[[str], None] = print
        self._program = program
        self._linker = link(world, program, guest.engine, resources)
        self._where = program.get_export_index(_HANDLE, program.get_export_index(export))
        self._signature: Signature | None = None

    def answer(self, store: wasmtime.Store, *arguments: object) -> None:
        """Have a new instance of the component handle a request. WasmtimeError when it traps."""
        handle = None
        if self._where is not None:
            handle = self._linker.instantiate(store, self._program).get_func(store, self._where)
        if handle is None:
            msg = f"the component exports no function {_HANDLE}"
            raise TypeError(msg)
        self._signature = self._signature or signature_of(handle.type(store))
        call(self.world.table, store, handle, *arguments, signature=self._signature)


class _Place:
    """An `Instance` of a world."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._defect = ""
        self._left: int | None = None
        self._exchange: Exchange | None = None
        self._number = next(_numbers)
        _places[self._number] = self

    def close(self) -> None:
        """There are no more requests in it."""
        del _places[self._number]

    def goes_on(self) -> bool:
        """Whether its instance is to, which computes."""
        return not self._service.guest.is_stopping and self._exchange is not None and self._exchange.is_wanted

    def leave(self, code: int) -> None:
        """`Instance`: the end of this one, not of the container."""
        self._left = code

    def fail(self, error: Exception) -> None:
        """`Instance`."""
        self._defect = f"internal error in a host function: {type(error).__name__}: {error}"

    def answer(self, exchange: Exchange) -> bool:
        """Have it answered: whether the connection is good for another request. Stopped when the guest is to stop."""
        self._defect, self._left, self._exchange = "", None, exchange
        text = self._run(exchange)
        usable = exchange.conclude(self._service.world.waiter)
        for complaint in (exchange.complaint, text):
            if complaint:
                self._service.say(f"wasi:http: {exchange.head.method} {exchange.head.target}: {complaint}")
        return usable

    def _run(self, exchange: Exchange) -> str:
        """What ended the instance, if it did not end by itself."""
        service, world, table = self._service, self._service.world, Table()
        world.running.instance, world.running.table = self, table
        store = wasmtime.Store(service.guest.engine)
        epoch.watch(store, _AT_EPOCH, self._number)
        world.waiter.serve(exchange)
        try:
            self._look()  # after the deadline has been set: one of the two sees that it is to end
            if exchange.is_wanted:
                body = IncomingBody(world.waiter, exchange.body)
                service.answer(store, IncomingRequest(world.waiter, exchange.head, body), ResponseOutparam(exchange))
                exchange.returned()
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001  the server goes on, whatever ended the instance
            self._look()
            return self._end(error) if exchange.is_wanted else ""
        finally:
            world.waiter.serve(None)
            store.close()
            table.close()
        return ""

    def _look(self) -> None:
        """Stopped when the guest is to stop."""
        if self._service.guest.is_stopping:
            raise Stopped

    def _end(self, error: Exception) -> str:
        if self._left is not None:
            return f"the component has left with code {self._left}" if self._left else ""
        return self._defect or str(error).strip() or type(error).__name__


class Places:
    """Made as they are needed. `hand_over` is called in one thread: that which starts theirs."""

    def __init__(self, service: Service, start: Callable[[Callable[[], None]], None]) -> None:
        """`start` starts a thread: ResourceExhausted."""
        self._service = service
        self._start = start
        self._queue: queue.SimpleQueue[Visit | None] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0
        self._changed = threading.Condition()

    def are_wanted(self) -> bool:
        """There are requests that wait for one. Any thread."""
        return self._idle < 0

    def hand_over(self, visit: Visit) -> None:
        """Have it answered, now or when there is a place. ResourceExhausted when there is not one."""
        with self._changed:
            self._idle -= 1  # below 0: requests that wait
            more = self._idle < 0 and self._threads < PLACES
            self._threads += more
            self._idle += more
        self._queue.put(visit)
        if more:
            self._begin()

    def _begin(self) -> None:
        try:
            self._start(self._serve)
        except ResourceExhausted:
            with self._changed:
                self._threads -= 1
                self._idle -= 1
                if not self._threads:
                    raise

    def close(self) -> None:
        """There are no more requests: returns when all places are empty, which those of a stopped guest soon are."""
        with self._changed:
            for _ in range(self._threads):
                self._queue.put(None)
            while self._threads:
                self._changed.wait()

    def _serve(self) -> None:
        place = _Place(self._service)
        try:
            while (visit := self._next()) is not None:
                usable = self._answer(place, visit)
                with self._changed:
                    self._idle += 1
                visit.end(usable)
        except Stopped:
            pass
        finally:
            place.close()
            with self._changed:
                self._threads -= 1
                self._changed.notify_all()

    def _next(self) -> Visit | None:
        """What comes next; None = the place is not needed any more. One stays, and waits for as long as it takes."""
        while True:
            try:
                return self._queue.get(timeout=_SPARE if self._threads > 1 else None)
            except queue.Empty:
                with self._changed:
                    if self._idle > 0 and self._threads > 1:
                        self._idle -= 1
                        return None

    def _answer(self, place: _Place, visit: Visit) -> bool:
        """All that the client asks for soon, unless others wait: whether the connection is good for more."""
        try:
            while place.answer(visit.exchange):
                if self._idle < 0 or not visit.goes_on(self._service.world.waiter):
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
