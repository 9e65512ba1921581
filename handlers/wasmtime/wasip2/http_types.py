"""`wasi:http/types`: all of it, from the modules that have its parts."""

from __future__ import annotations

from handlers.wasmtime.wasip2 import http_bodies, http_fields, http_messages
from handlers.wasmtime.wasip2.http_errors import http_error_code
from handlers.wasmtime.wasip2.http_fields import Fields
from handlers.wasmtime.wasip2.interface import Interface
from handlers.wasmtime.wasip2.poll import Pollable
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.streams import InputStream, IoError, OutputStream
from handlers.wasmtime.wasip2.world import World


def interface(world: World) -> Interface:
    """`wasi:http/types`."""
    resources: dict[str, type[Resource]] = {
        **dict.fromkeys(("fields", "headers", "trailers"), Fields),
        "input-stream": InputStream,
        "output-stream": OutputStream,
        "io-error": IoError,
        "pollable": Pollable,
        **http_bodies.RESOURCES,
        **http_messages.RESOURCES,
    }
    return Interface(
        resources,
        {
            "http-error-code": http_error_code,
            **http_fields.FUNCTIONS,
            **http_bodies.FUNCTIONS,
            **http_messages.functions(world.waiter),
        },
    )
