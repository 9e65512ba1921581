"""A component of the world `wasi:http/proxy` as a guest's program: it answers the requests of a server of ours.

Not the connections (`http_server`) and not the answers (`http_places`). Invariant: when the program is linked it can be
served, and its listeners are open; when it has ended nothing of it runs any more.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass

import wasmtime
from wasmtime import component

from cri_shim.model.errors import FailedPrecondition
from handlers.wasmtime.ending import Ending
from handlers.wasmtime.guest import Guest, Linked, start_thread
from handlers.wasmtime.guest_spec import Http
from handlers.wasmtime.sockets import Stopped, listener
from handlers.wasmtime.wasip2.http_places import Places, Service
from handlers.wasmtime.wasip2.http_server import Listening
from handlers.wasmtime.wasip2.world import new_world


def link_proxy(guest: Guest, program: component.Component, export: str, resources: ExitStack) -> Linked:
    """A `Program`, for a component that exports `export`, a version of `wasi:http/incoming-handler`."""
    http = guest.spec.http
    if http is None:
        msg = "the component serves wasi:http and has nothing that could be run beside the server"
        raise FailedPrecondition(msg, hint="exec another module of the image")
    world = new_world(guest, resources)
    service = Service(guest, world, program, export, resources)
    places = Places(service, start_thread)
    listeners, interrupt = _listeners(http, resources), guest.engine.increment_epoch
    server = Listening(listeners, world.waiter, places.hand_over, places.are_wanted, interrupt)
    resources.callback(server.close)
    guest.wait_in(server)
    output = guest.give_files(lambda output: world.open(output, resources), resources)
    service.say = output.say
    # Nothing runs in this store: every request has one of its own.
    return Linked(wasmtime.Store(guest.engine), output, _Serve(guest, server, places).execute)


def _listeners(http: Http, resources: ExitStack) -> list[socket.socket]:
    made = []
    for address, port in http.addresses:
        try:
            made.append(resources.enter_context(listener(address, port)))
        except OSError as error:
            msg = f"cannot serve HTTP at {address or '*'}:{port}: {error.strerror}"
            raise FailedPrecondition(msg) from error
    return made


@dataclass(frozen=True, slots=True)
class _Serve:
    guest: Guest
    server: Listening
    places: Places

    def execute(self) -> Ending:
        """Until it is told to stop; drained, it has ended well."""
        try:
            self.server.run()
        except Stopped:
            return Ending(signal=self.guest.signal)
        except Exception as error:  # noqa: BLE001  a container ends, whatever ended it
            return Ending(trap=f"internal error in the HTTP server: {type(error).__name__}: {error}")
        finally:
            self.places.close()
        return Ending()
