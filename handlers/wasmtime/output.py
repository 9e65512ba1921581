"""The two pipes, or the terminal, between a guest and the log thread.

Not the log. Invariant: a descriptor made here is closed exactly once, by `close` or by the log thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Final

from cri_shim.adapters.log_pump import LogPump
from cri_shim.adapters.log_sink import LogFile
from cri_shim.kernel import tty
from cri_shim.model.errors import FailedPrecondition
from cri_shim.wire.crilog import Stream
from handlers.wasmtime.guest_spec import GuestSpec

STANDARD_STREAMS: Final = (0, 1, 2)


def _log(path: str) -> LogFile:
    try:
        return LogFile(path or None)
    except OSError as error:
        msg = f"cannot open the container's log {path}: {error.strerror}"
        raise FailedPrecondition(msg) from error


class Output:
    """Standard output and standard error of one guest."""

    def __init__(self, log_path: str) -> None:
        """FailedPrecondition when the log cannot be opened, OSError when the daemon is out of descriptors."""
        self.log = _log(log_path)
        self._open: list[int] = []
        try:
            self._stdout, self._stderr = self._pipe(), self._pipe()
        except BaseException:
            self.close()
            raise

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe2(os.O_CLOEXEC)
        self._open.extend(ends)
        return ends

    @property
    def hangs(self) -> bool:
        """Its log takes nothing: the file system does not answer. After `hand_over`."""
        return self._pumped.hangs

    @property
    def stdout_path(self) -> str:
        """A file name for the write end: the engine opens names only."""
        return f"/proc/self/fd/{self._stdout[1]}"

    @property
    def stderr_path(self) -> str:
        """Likewise."""
        return f"/proc/self/fd/{self._stderr[1]}"

    def hand_over(self, pump: LogPump, drained: Callable[[], None]) -> None:
        """The engine has opened its own ends: the pump takes the log and the read ends, until the guest has ended."""
        self._close(self._stdout[1])
        self._pump = pump
        reads = {Stream.STDOUT: self._stdout[0], Stream.STDERR: self._stderr[0]}
        for fd in reads.values():
            self._open.remove(fd)
        self._pumped = pump.attach(self.log, reads, drained)

    def tap(self, end: socket.socket) -> None:
        """Copy what is written from now on to `end`; see `LogPump.tap`. After `hand_over`."""
        self._pump.tap(self._pumped, end)

    def log_to(self, fd: int, done: Callable[[], None]) -> None:
        """Write to another file from now on; see `LogPump.replace`. After `hand_over`."""
        self._pump.replace(self._pumped, fd, done)

    def let_go(self) -> None:
        """The guest is to end: see `LogPump.let_go`. After `hand_over`."""
        self._pump.let_go(self._pumped)

    def say(self, text: str) -> None:
        """A last word on standard error, from the engine."""
        data = memoryview(text.encode(errors="replace") + b"\n")
        while data:
            data = data[os.write(self._stderr[1], data) :]

    def close(self) -> None:
        """Close what is still ours. The log thread sees the end when the engine has closed its ends too."""
        if len(self._open) > 1:  # not handed over
            self.log.close()
        for fd in tuple(self._open):
            self._close(fd)

    def _close(self, fd: int) -> None:
        self._open.remove(fd)
        os.close(fd)


class Terminal:
    """A new terminal as the standard streams of a process that is the guest's alone, and the process's own terminal.

    What the guest writes to it, and what it echoes, is one stream of the log.
    """

    stdout_path = "/proc/self/fd/1"
    stderr_path = "/proc/self/fd/2"

    def __init__(self, log_path: str) -> None:
        """As of `Output`."""
        self.log = _log(log_path)
        try:
            self.master, slave = os.openpty()
        except BaseException:
            self.log.close()
            raise
        os.set_blocking(self.master, False)
        tty.make_own(slave)
        self._handed_over = False

    def hand_over(self, pump: LogPump, drained: Callable[[], None]) -> None:
        """The pump takes the log and reads the terminal, until the guest has ended."""
        self._pump, self._handed_over = pump, True
        self._pumped = pump.attach(self.log, {Stream.STDOUT: os.dup(self.master)}, drained)

    def tap(self, end: socket.socket) -> None:
        """As of `Output`."""
        self._pump.tap(self._pumped, end)

    def log_to(self, fd: int, done: Callable[[], None]) -> None:
        """As of `Output`."""
        self._pump.replace(self._pumped, fd, done)

    def let_go(self) -> None:
        """As of `Output`."""
        self._pump.let_go(self._pumped)

    def say(self, text: str) -> None:
        """As of `Output`."""
        os.write(1, text.encode(errors="replace") + b"\n")

    def end_input(self) -> None:
        """A guest that reads lines reads end-of-file, if there is room for the character."""
        with contextlib.suppress(OSError):
            os.write(self.master, tty.end_of_file(self.master))

    def close(self) -> None:
        """The pump reads the end when nothing has the terminal open any more."""
        if not self._handed_over:
            self.log.close()
        for number in STANDARD_STREAMS:
            os.close(number)


class Plain:
    """The standard streams of a process that is the guest's alone: nothing is logged."""

    stdout_path = "/proc/self/fd/1"
    stderr_path = "/proc/self/fd/2"

    def __init__(self) -> None:
        self._drained: Callable[[], None] | None = None

    def hand_over(self, pump: LogPump, drained: Callable[[], None]) -> None:
        """Nobody has to read anything: `drained` follows at `close`."""
        del pump
        self._drained = drained

    def say(self, text: str) -> None:
        """A last word on standard error, from the engine."""
        with contextlib.suppress(OSError):
            os.write(2, text.encode(errors="replace") + b"\n")

    def close(self) -> None:
        """The guest has ended, or was not started."""
        if self._drained is not None:
            self._drained()


Streams = Output | Terminal | Plain
"""Of a guest: where it writes, and what becomes of that."""


def streams_of(spec: GuestSpec) -> Streams:
    """What is logged of a container."""
    return (Terminal if spec.terminal else Output)(spec.log_path)
