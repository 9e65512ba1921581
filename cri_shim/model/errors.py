"""Domain errors: what went wrong and what to do about it, in one sentence each.

Not a logging facility and not gRPC: `cri_shim.rpc.status` maps `Code` to a status code, once.
Invariant: `str(error)` is fit for a pod's event: cause first, then the hint, no stack trace, no secret.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Code(enum.Enum):
    """The classes of failure that a CRI client can tell apart (contract: gRPC status codes)."""

    INVALID_ARGUMENT = "invalid argument"
    NOT_FOUND = "not found"
    ALREADY_EXISTS = "already exists"
    FAILED_PRECONDITION = "failed precondition"
    RESOURCE_EXHAUSTED = "resource exhausted"
    ABORTED = "aborted"
    DEADLINE_EXCEEDED = "deadline exceeded"
    CANCELLED = "cancelled"
    UNIMPLEMENTED = "unimplemented"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"
    UNKNOWN = "unknown"


class CriShimError(Exception):
    """A failure with a cause, and a hint where there is something the user can do."""

    code: ClassVar[Code] = Code.INTERNAL

    def __init__(self, cause: str, *, hint: str = "") -> None:
        super().__init__(f"{cause}; {hint}" if hint else cause)
        self.cause = cause
        self.hint = hint


class InvalidArgument(CriShimError):
    """The request itself is wrong, whatever the state of the node."""

    code = Code.INVALID_ARGUMENT


class NotFound(CriShimError):
    """The named pod, container, image or log does not exist."""

    code = Code.NOT_FOUND


class AlreadyExists(CriShimError):
    """The name is taken by something that differs from the request."""

    code = Code.ALREADY_EXISTS


class FailedPrecondition(CriShimError):
    """The request is right, the object is in the wrong state or the node lacks something."""

    code = Code.FAILED_PRECONDITION


class WrongState(FailedPrecondition):
    """The object is in the wrong state, and nothing is amiss on the node: clients hear of states a moment late."""


class CannotExecute(FailedPrecondition):
    """There is no such program in the container (127), or nothing that its user may execute (126), as shells say it."""

    def __init__(self, cause: str, *, hint: str = "", exit_status: int) -> None:
        super().__init__(cause, hint=hint)
        self.exit_status = exit_status


class ResourceExhausted(CriShimError):
    """A limit of the node is reached: disk, tokens, processes."""

    code = Code.RESOURCE_EXHAUSTED


class DeadlineExceeded(CriShimError):
    """A deadline of the request or of a step has passed; what it started has been ended."""

    code = Code.DEADLINE_EXCEEDED


class Unimplemented(CriShimError):
    """The RPC or the field is not supported (yet); `docs/conformance.md` lists it."""

    code = Code.UNIMPLEMENTED


class Unavailable(CriShimError):
    """The daemon cannot answer now; the same request later can succeed."""

    code = Code.UNAVAILABLE


class NotReady(Unavailable):
    """A pod that does not run has nothing to tell of (contract: PodSandboxStats)."""


class Internal(CriShimError):
    """A defect of this daemon or of a tool that it drives."""

    code = Code.INTERNAL


class ImageVolumeMountFailed(CriShimError):
    """An image volume cannot be given. The prefix becomes a waiting reason of its own (kubelet, kuberuntime)."""

    code = Code.FAILED_PRECONDITION

    def __init__(self, cause: str, *, hint: str = "") -> None:
        super().__init__(f"ImageVolumeMountFailed: mounts: {cause}", hint=hint)


class ImageNotHere(ImageVolumeMountFailed):
    """The image of an image volume has not been pulled."""

    code = Code.NOT_FOUND


class PullError(CriShimError):
    """A pull failed. Code UNKNOWN, so that the kubelet shows the bare message.

    A cause that starts with `RegistryUnavailable` or `SignatureValidationFailed` becomes a waiting reason of its own
    (kubelet image manager, `evalCRIPullErr`).
    """

    code = Code.UNKNOWN
