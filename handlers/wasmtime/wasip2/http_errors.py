"""`error-code` of `wasi:http/types`: from what went wrong, and to the status that a client gets. Pure.

A code is a variant's value: its case and its payload.
"""

from __future__ import annotations

import errno
from typing import Final

from cri_shim.wire.http1 import BrokenMessage
from handlers.wasmtime.wasip2.interface import Failure
from handlers.wasmtime.wasip2.streams import IoError

Code = tuple[str, object]

_STATUS: Final = {
    "DNS-timeout": 504,
    "connection-timeout": 504,
    "connection-read-timeout": 504,
    "connection-write-timeout": 504,
    "HTTP-response-timeout": 504,
    "connection-limit-reached": 503,
    "HTTP-request-denied": 403,
    "HTTP-request-length-required": 411,
    "HTTP-request-body-size": 413,
    "HTTP-request-method-invalid": 400,
    "HTTP-request-URI-invalid": 400,
    "HTTP-request-URI-too-long": 414,
    "HTTP-request-header-section-size": 431,
    "HTTP-request-header-size": 431,
    "HTTP-request-trailer-section-size": 431,
    "HTTP-request-trailer-size": 431,
    "loop-detected": 508,
    "configuration-error": 500,
    "internal-error": 500,
}
_BAD_GATEWAY: Final = 502
"""Of all others: something behind the component has failed."""
_ERRNOS: Final = {
    errno.ECONNREFUSED: "connection-refused",
    errno.ECONNRESET: "connection-terminated",
    errno.EPIPE: "connection-terminated",
    errno.ETIMEDOUT: "connection-timeout",
    errno.EHOSTUNREACH: "destination-IP-unroutable",
    errno.ENETUNREACH: "destination-IP-unroutable",
    errno.EACCES: "destination-IP-prohibited",
    errno.EPERM: "destination-IP-prohibited",
}


class HttpError(Exception):
    """A message cannot be sent or received, for this reason."""

    def __init__(self, code: Code) -> None:
        super().__init__(describe(code))
        self.code = code


def status_of(code: Code) -> int:
    """What a client is answered when this is all that the component has to say."""
    return _STATUS.get(code[0], _BAD_GATEWAY)


def describe(code: Code) -> str:
    """In words."""
    case, payload = code
    return case if payload is None else f"{case}: {payload}"


def code_of(error: OSError | BrokenMessage) -> Code:
    """Of what a connection's socket or its peer's bytes gave."""
    if isinstance(error, BrokenMessage):
        return ("HTTP-protocol-error", None)
    case = _ERRNOS.get(error.errno or 0)
    return (case, None) if case is not None else ("internal-error", str(error))


def http_error_code(error: IoError) -> Code | None:
    """`http-error-code`: None for errors of other streams."""
    return error.cause.code if isinstance(error.cause, HttpError) else None


def failure(code: Code) -> Failure:
    """An `err` with this code."""
    return Failure(code)
