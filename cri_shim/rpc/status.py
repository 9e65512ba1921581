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
"""gRPC sends the message as a header; peers refuse headers above 8 KiB."""


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The code and the one sentence that a client gets."""
    if isinstance(error, CriShimError):
        return _CODES[error.code], str(error)[:_MAX_DETAILS]
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
        where = f": {error.filename}" if error.filename else ""
        text = f"{error.strerror or os.strerror(error.errno)}{where}"[:_MAX_DETAILS]
        return (grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.INTERNAL), text
    return grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}; see the daemon's log"
