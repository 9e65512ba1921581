"""`wasi:io/error` and `wasi:io/streams`: what is common to all streams.

Not where bytes come from: a stream is a subclass, of `InputStream` with `receive`, of `OutputStream` with `capacity`
and `send`. Invariant: a stream holds no more than one permit of its own; what does not fit waits in the guest.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Final

from handlers.wasmtime.wasip2.interface import Failure, Interface, Trap, methods
from handlers.wasmtime.wasip2.poll import Pollable
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.waiter import Always, FdSource, Source, Waiter
from handlers.wasmtime.wasip2.world import World

CHUNK: Final = 16384
"""Bytes that one call reads at most: on the way through the engine's API each byte takes 32."""
PERMIT: Final = 4096
"""Bytes that one call writes at most. Of more the values take memory from the kernel each time, at half the speed."""
_MOST_AT_ONCE: Final = 4096
"""Of the functions that write and flush in one (streams.wit)."""


class IoError(Resource, resource=True):
    """`error`: what is known of a failure. `cause` is for interfaces that have more to say about their own errors."""

    def __init__(self, text: str, cause: object = None) -> None:
        self.text = text
        self.cause = cause

    def to_debug_string(self) -> str:
        """`error.to-debug-string`."""
        return self.text


class StreamClosed(Failure):
    """`stream-error.closed`: the stream is at its end, or nobody takes what is written."""

    def __init__(self) -> None:
        super().__init__(("closed", None))


class StreamFailed(Failure):
    """`stream-error.last-operation-failed`."""

    def __init__(self, text: str, cause: object = None) -> None:
        super().__init__(("last-operation-failed", IoError(text, cause)))


class InputStream(Resource, resource=True):
    """`input-stream`."""

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter

    def receive(self, size: int) -> bytes:
        """What is there, `size` bytes at most (never 0); b"" = nothing yet. StreamClosed at the end, StreamFailed."""
        raise NotImplementedError

    def source(self) -> Source:
        """Ready when `receive` does not come back with nothing."""
        raise NotImplementedError

    def refuse_ended(self) -> None:
        """StreamClosed where it is known to be at its end already."""

    def read(self, size: int) -> bytes:
        """`input-stream.read`."""
        if not size:
            self.refuse_ended()
            return b""
        return self.receive(min(size, CHUNK))

    def blocking_read(self, size: int) -> bytes:
        """`input-stream.blocking-read`."""
        data = self.read(size)
        while size and not data:
            self.waiter.wait((self.source(),))
            data = self.read(size)
        return data

    def skip(self, size: int) -> int:
        """`input-stream.skip`."""
        return len(self.read(size))

    def blocking_skip(self, size: int) -> int:
        """`input-stream.blocking-skip`."""
        return len(self.blocking_read(size))

    def subscribe(self) -> Pollable:
        """`input-stream.subscribe`."""
        return Pollable(self.waiter, self.source())


class OutputStream(Resource, resource=True):
    """`output-stream`."""

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter
        self._permit = 0

    def capacity(self) -> int:
        """Bytes that `send` takes now; 0 = wait. StreamClosed, StreamFailed."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Take all of it; it is within the capacity."""
        raise NotImplementedError

    def flushed(self) -> bool:
        """Whether all that was taken has gone out; called again when `source` is ready."""
        return True

    def source(self) -> Source:
        """Ready when there is capacity, and what is to be flushed is."""
        raise NotImplementedError

    def check_write(self) -> int:
        """`output-stream.check-write`."""
        self._permit = self.capacity()
        return self._permit

    def write(self, data: bytes) -> None:
        """`output-stream.write`."""
        if len(data) > self._permit:
            msg = f"wasi:io/streams: {len(data)} bytes were written where check-write permitted {self._permit}"
            raise Trap(msg)
        self._permit -= len(data)
        if data:
            self.send(data)

    def blocking_write_and_flush(self, data: bytes) -> None:
        """`output-stream.blocking-write-and-flush`."""
        if len(data) > _MOST_AT_ONCE:
            msg = f"wasi:io/streams: {len(data)} bytes at once to be written and flushed, of at most {_MOST_AT_ONCE}"
            raise Trap(msg)
        while data:
            size = self._wait_for_capacity()
            self.send(data[:size])
            data = data[size:]
        self.blocking_flush()

    def flush(self) -> None:
        """`output-stream.flush`."""
        self.flushed()

    def blocking_flush(self) -> None:
        """`output-stream.blocking-flush`."""
        while not self.flushed():
            self.waiter.wait((self.source(),))

    def subscribe(self) -> Pollable:
        """`output-stream.subscribe`."""
        return Pollable(self.waiter, self.source())

    def write_zeroes(self, size: int) -> None:
        """`output-stream.write-zeroes`."""
        self.write(bytes(min(size, self._permit + 1)))

    def blocking_write_zeroes_and_flush(self, size: int) -> None:
        """`output-stream.blocking-write-zeroes-and-flush`."""
        self.blocking_write_and_flush(bytes(min(size, _MOST_AT_ONCE + 1)))

    def splice(self, source: InputStream, size: int) -> int:
        """`output-stream.splice`."""
        return self._moved(source.read, min(size, self.capacity()))

    def blocking_splice(self, source: InputStream, size: int) -> int:
        """`output-stream.blocking-splice`."""
        moved = self._moved(source.blocking_read, min(size, self._wait_for_capacity())) if size else 0
        self.blocking_flush()
        return moved

    def _moved(self, read: Callable[[int], bytes], size: int) -> int:
        self._permit = 0  # what was permitted before is used up
        data = read(size) if size else b""
        if data:
            self.send(data)
        return len(data)

    def _wait_for_capacity(self) -> int:
        while True:
            size = self.capacity()
            if size:
                return size
            self.waiter.wait((self.source(),))


class FdInput(InputStream):
    """A non-blocking descriptor, a pipe's or a terminal's, which stays open when the stream is dropped."""

    def __init__(self, waiter: Waiter, fd: int) -> None:
        super().__init__(waiter)
        self._fd = fd

    def receive(self, size: int) -> bytes:
        """`InputStream`."""
        try:
            data = os.read(self._fd, size)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise StreamFailed(str(error), error) from None
        if not data:
            raise StreamClosed
        return data

    def source(self) -> Source:
        """`InputStream`."""
        return FdSource(self._fd, select.POLLIN)


class NoInput(InputStream):
    """At its end from the start."""

    def receive(self, size: int) -> bytes:
        """`InputStream`."""
        del size
        raise StreamClosed

    def source(self) -> Source:
        """`InputStream`."""
        return Always()


class FdOutput(OutputStream):
    """A non-blocking descriptor, a pipe's or a terminal's, which stays open when the stream is dropped.

    Nothing is kept back: what was taken has been written, as with write(2) of a process.
    """

    def __init__(self, waiter: Waiter, fd: int) -> None:
        super().__init__(waiter)
        self._fd = fd

    def capacity(self) -> int:
        """`OutputStream`."""
        return PERMIT

    def send(self, data: bytes) -> None:
        """`OutputStream`."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                self.waiter.wait((FdSource(self._fd, select.POLLOUT),))
            except BrokenPipeError:
                raise StreamClosed from None
            except OSError as error:
                raise StreamFailed(str(error), error) from None

    def source(self) -> Source:
        """`OutputStream`."""
        return Always()


def errors(_world: World) -> Interface:
    """`wasi:io/error`."""
    return Interface({"error": IoError}, methods("error", IoError, "to-debug-string"))


def interface(_world: World) -> Interface:
    """`wasi:io/streams`."""
    return Interface(
        {"error": IoError, "pollable": Pollable, "input-stream": InputStream, "output-stream": OutputStream},
        {
            **methods("input-stream", InputStream, "read", "blocking-read", "skip", "blocking-skip", "subscribe"),
            **methods(
                "output-stream",
                OutputStream,
                *("check-write", "write", "blocking-write-and-flush", "flush", "blocking-flush", "subscribe"),
                *("write-zeroes", "blocking-write-zeroes-and-flush", "splice", "blocking-splice"),
            ),
        },
    )
