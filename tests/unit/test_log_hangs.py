"""A log that does not return from a write: a FIFO that nobody reads, for a file system that does not answer."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cri_shim.adapters.log_pump import LogPump
from cri_shim.adapters.log_sink import LogFile
from cri_shim.wire.crilog import Stream

LINE = b"x" * 1023 + b"\n"


@pytest.fixture
def pump() -> Iterator[LogPump]:
    made = LogPump()
    yield made
    made.close()


class Guest:
    """The container's side: the write end of a pipe that the pump reads."""

    def __init__(self, pump: LogPump, path: Path) -> None:
        self.log = LogFile(path)
        self.drained = threading.Event()
        out, self.out = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.out, False)
        self.pumped = pump.attach(self.log, {Stream.STDOUT: out}, self.drained.set)

    def write(self, data: bytes) -> int:
        """How much of it there is room for."""
        try:
            return os.write(self.out, data)
        except BlockingIOError:
            return 0

    def fill(self) -> int:
        """Write lines until there is no room for one for a while; how many."""
        lines, until = 0, time.monotonic() + 1
        while time.monotonic() < until:
            if self.write(LINE):
                lines, until = lines + 1, time.monotonic() + 0.3
            else:
                time.sleep(0.01)
        return lines

    def end(self) -> None:
        os.close(self.out)


class Hanging:
    """A log that takes 4 KiB, and no more until somebody reads it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self.reader, fcntl.F_SETPIPE_SZ, 4096)

    def recover(self) -> bytes:
        """Read it to its end."""
        os.set_blocking(self.reader, True)
        found = b""
        while data := os.read(self.reader, 1 << 16):
            found += data
        return found

    def close(self) -> None:
        os.close(self.reader)


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Hanging]:
    made = Hanging(tmp_path / "hanging")
    yield made
    made.close()  # who still writes gets EPIPE


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def hung(pump: LogPump, hanging: Hanging) -> Guest:
    guest = Guest(pump, hanging.path)
    guest.write(LINE * 32)
    until(lambda: guest.pumped.hangs)
    return guest


def test_others_go_on_and_nothing_is_lost(pump: LogPump, hanging: Hanging, tmp_path: Path) -> None:
    guest = hung(pump, hanging)
    other = Guest(pump, tmp_path / "other")
    other.write(b"still here\n")
    until(lambda: b"still here" in (tmp_path / "other").read_bytes())
    lines = 32 + guest.fill()
    assert lines < 150, "it is held up by a full pipe"
    guest.end()
    found = hanging.recover()
    assert guest.drained.wait(10)
    assert [line.split(b" ", 3)[3] + b"\n" for line in found.splitlines()] == [LINE] * lines
    assert guest.log.dropped == 0
    other.end()
    assert other.drained.wait(10)


def test_several_that_hang_at_once(pump: LogPump, tmp_path: Path) -> None:
    logs = [Hanging(tmp_path / str(number)) for number in range(10)]
    guests = [hung(pump, each) for each in logs]
    other = Guest(pump, tmp_path / "other")
    other.write(b"still here\n")
    other.end()
    assert other.drained.wait(10)
    for guest, log in zip(guests, logs, strict=True):
        guest.end()
        assert log.recover().count(b"\n") == 32
        assert guest.drained.wait(10)
        log.close()


def test_who_is_to_end_waits_for_no_log(pump: LogPump, hanging: Hanging) -> None:
    guest = hung(pump, hanging)
    guest.fill()
    pump.let_go(guest.pumped)
    until(lambda: guest.write(LINE) > 0)  # what it was writing gets through
    guest.end()
    assert guest.drained.wait(10)
    assert guest.log.dropped > 0


def test_who_is_to_end_has_its_last_words_in_a_log_that_comes_back(pump: LogPump, hanging: Hanging) -> None:
    guest = hung(pump, hanging)
    lines = 32 + guest.fill()
    pump.let_go(guest.pumped)
    guest.end()
    assert hanging.recover().count(b"\n") == lines
    assert guest.drained.wait(10)
    assert guest.log.dropped == 0


def test_who_ended_before_is_told_when_it_is_let_go(pump: LogPump, hanging: Hanging) -> None:
    guest = hung(pump, hanging)
    guest.end()
    assert not guest.drained.wait(0.2)
    pump.let_go(guest.pumped)
    assert guest.drained.wait(10)


def test_the_pump_ends_all_the_same(hanging: Hanging) -> None:
    pump = LogPump()
    guest = hung(pump, hanging)
    pump.close()
    guest.end()


def test_who_is_to_end_waits_for_no_client(pump: LogPump, tmp_path: Path) -> None:
    guest = Guest(pump, tmp_path / "log")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pump.tap(guest.pumped, theirs)
    lines = guest.fill()
    pump.let_go(guest.pumped)
    guest.end()
    assert guest.drained.wait(10)
    assert (tmp_path / "log").read_bytes().count(b"\n") == lines
    ours.settimeout(10)
    seen = 0
    while packet := ours.recv(1 << 16):  # it may still have the rest
        seen += packet.count(b"\n")
    assert seen == lines
    ours.close()
