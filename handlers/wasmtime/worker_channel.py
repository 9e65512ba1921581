"""The daemon's end of the connection to a worker: requests, answers, and descriptors with either.

    {"go": true} ─▶ {"started": ns} | {"failed": [NAME, CAUSE, HINT]}       one JSON object per message (SOCK_SEQPACKET)

Not what they mean (`handlers.wasmtime.worker_run`). Invariant: who waits for an answer gets one, or an error: a worker
that ends closes its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cri_shim.model import errors
from cri_shim.model.errors import CriShimError, DeadlineExceeded, FailedPrecondition, Internal
from handlers.wasmtime.worker_files import Files, short_name

ANSWER_SECONDS: Final = 10.0
_MESSAGE: Final = 1 << 16


class GoneError(FailedPrecondition):
    """The worker has ended."""


@dataclass(slots=True)
class Channel:
    """The daemon's end of a connection. One question of a kind at a time."""

    sock: socket.socket
    _waiting: dict[str, asyncio.Future[Any]] = field(default_factory=dict)
    _early: dict[str, Any] = field(default_factory=dict)
    _closed: bool = False
    left: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """The worker has written down its end, and its process may take longer."""

    @classmethod
    def connect(cls, files: Files) -> Channel:
        """OSError when nobody listens."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with contextlib.ExitStack() as stack:
                sock.connect(short_name(files.socket, stack))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def listen(self) -> None:
        """What comes is taken from now on."""
        self.sock.setblocking(False)
        asyncio.get_running_loop().add_reader(self.sock.fileno(), self._receive)

    def send(self, request: Mapping[str, object], *fds: int) -> None:
        """The worker may have gone: its pidfd tells."""
        if not self._closed:
            with contextlib.suppress(OSError):
                socket.send_fds(self.sock, [json.dumps(request).encode()], fds)

    async def ask(self, request: Mapping[str, object], key: str, *fds: int) -> Any:
        """`send`, then `answer`."""
        self.send(request, *fds)
        return await self.answer(key)

    async def answer(self, key: str) -> Any:
        """Wait for a message with this key. FailedPrecondition when the worker has gone, or what it says instead."""
        if key in self._early:
            return self._early.pop(key)
        if self._closed:
            raise _gone()
        waiting = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await waiting
        except TimeoutError:
            msg = f"the Wasm worker did not answer within {ANSWER_SECONDS:g} s"
            raise DeadlineExceeded(msg) from None
        finally:
            self._waiting.pop(key, None)

    def close(self) -> None:
        """Who waits is told that the worker has gone. A second call does nothing."""
        if not self._closed:
            self._closed = True
            asyncio.get_running_loop().remove_reader(self.sock.fileno())
            self.sock.close()
            self._fail(_gone())

    def _fail(self, error: CriShimError) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)

    def _receive(self) -> None:
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, _MESSAGE, 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        for key, value in json.loads(data).items():
            answer = fds.pop() if fds else value
            if key == "ended":
                self.left.set_result(None)
            elif key == "failed":
                self._fail(_failure(*value))
            elif (found := self._waiting.get(key)) is not None and not found.done():
                found.set_result(answer)
            elif answer is value:
                self._early[key] = value
            else:  # whoever asked has gone
                os.close(answer)


def _failure(name: str, cause: str, hint: str) -> CriShimError:
    kind = getattr(errors, name, Internal)
    error: CriShimError = kind(cause, hint=hint)
    return error


def _gone() -> CriShimError:
    return GoneError("the Wasm worker has ended")
