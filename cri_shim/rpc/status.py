"""Domain errors to gRPC status: the one place that knows both. Pure."""

from __future__ import annotations

import errno
import os

import grpc

from cri_shim.model.errors import Code, CriShimError

_CODES = {
    Code.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Code.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Code.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Code.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Code.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.ABORTED: grpc.StatusCode.ABORTED,
    Code.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Code.CANCELLED: grpc.StatusCode.CANCELLED,
    Code.UNIMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    Code.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Code.INTERNAL: grpc.StatusCode.INTERNAL,
    Code.UNKNOWN: grpc.StatusCode.UNKNOWN,
}
_MAX_DETAILS = 4000
"""Bytes on the wire: gRPC sends the message as a header, and peers refuse headers above 8 KiB."""


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The code and the one sentence that a client gets."""
    if isinstance(error, CriShimError):
        return _CODES[error.code], _fit(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
        where = f": {error.filename}" if error.filename else ""
        text = _fit(f"{error.strerror or os.strerror(error.errno)}{where}")
        return (grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.INTERNAL), text
    return grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}; see the daemon's log"


def _fit(text: str) -> str:
    """On one line, and not too long: a byte that is not printable ASCII is sent as three (percent-encoding)."""
    line = " ".join(text.splitlines())
    while len(line) + 2 * sum(len(c.encode()) for c in line if not " " <= c <= "~") > _MAX_DETAILS:
        line = line[: len(line) * 7 // 8]
    return line
