"""The words of exec and attach: which streams there are, how an end is told, what a resize looks like.

Not what carries the streams (`wire.mux`). The sub-protocols are `channel.k8s.io` (v1) to `v5.channel.k8s.io`: from v3
on there is a resize stream, from v4 on the end is a `metav1.Status` in JSON, from v5 on a WebSocket client can end
its stdin. Invariant: a client always learns why a command has failed, in whichever version it speaks.
"""

from __future__ import annotations

import enum
import json
from typing import Any, Final

import msgspec

from cri_shim.model.streams import TerminalSize, Wanted

STREAM_TYPE: Final = "streamtype"
"""The header that names a stream's role."""
RESIZE_SINCE: Final = 3
STATUS_SINCE: Final = 4
CLOSE_SINCE: Final = 5


class Role(enum.Enum):
    """What a stream is for; the value is how the client's header names it."""

    STDIN = "stdin"
    STDOUT = "stdout"
    STDERR = "stderr"
    ERROR = "error"
    RESIZE = "resize"


CHANNELS: Final = {role: number for number, role in enumerate(Role)}
"""On a WebSocket the roles are numbered."""
FROM_CLIENT: Final = frozenset({CHANNELS[Role.STDIN], CHANNELS[Role.RESIZE]})


def expected(wanted: Wanted, version: int) -> frozenset[Role]:
    """The streams that a client opens for what it has asked for."""
    asked = {
        Role.ERROR: True,
        Role.STDIN: wanted.stdin,
        Role.STDOUT: wanted.stdout,
        Role.STDERR: wanted.stderr,
        Role.RESIZE: wanted.tty and version >= RESIZE_SINCE,
    }
    return frozenset(role for role, is_asked in asked.items() if is_asked)


def exit_report(code: int, version: int) -> bytes:
    """What goes on the error stream when a command has ended; nothing for success before v4."""
    if not code:
        return _status({"metadata": {}, "status": "Success"}) if version >= STATUS_SINCE else b""
    message = f"command terminated with exit code {code}"
    if version < STATUS_SINCE:
        return message.encode()
    causes = [{"reason": "ExitCode", "message": str(code)}]
    return _status(_failure(message) | {"reason": "NonZeroExitCode", "details": {"causes": causes}})


def failure_report(message: str, version: int) -> bytes:
    """What goes on the error stream when the command could not be run, or could not be run to its end."""
    if version < STATUS_SINCE:
        return message.encode(errors="replace")
    return _status(_failure(message) | {"reason": "InternalError", "code": 500})


def refusal(message: str, reason: str, code: int) -> bytes:
    """The body of an HTTP error, in the form that client-go turns into its message."""
    return _status({"kind": "Status", "apiVersion": "v1"} | _failure(message) | {"reason": reason, "code": code})


def _failure(message: str) -> dict[str, Any]:
    return {"metadata": {}, "status": "Failure", "message": message}


def _status(document: dict[str, Any]) -> bytes:
    # A message may hold bytes of a file name that are no text: escaped, every client can read it.
    return json.dumps(document, separators=(",", ":")).encode("ascii")


class _Size(msgspec.Struct):
    width: int = msgspec.field(name="Width", default=0)
    height: int = msgspec.field(name="Height", default=0)


class SizeParser:
    """Reads a resize stream: `{"Width":80,"Height":24}` again and again, with or without white space between."""

    LONGEST: Final = 1024
    """Bytes without the end of a document; more is no size."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> TerminalSize | None:
        """The latest size that `data` completes. What is no size, or has no room for a character, is left out."""
        *documents, self._held = (self._held + data).split(b"}")
        self._held = self._held[: self.LONGEST]
        for document in reversed(documents):
            try:
                size = msgspec.json.decode(document + b"}", type=_Size)
            except msgspec.DecodeError:
                continue
            if 0 < size.width < 1 << 16 and 0 < size.height < 1 << 16:
                return TerminalSize(size.width, size.height)
        return None
