"""Calls on sockets: every pointer is checked, every descriptor is somebody's, and what waits can be stopped."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.wasmtime.errnos import Errno
from handlers.wasmtime.socket_calls import PARAMETERS, Calls, function
from handlers.wasmtime.sockets import FIRST_CONNECTION, Sockets, Stopped, listen

SIZE = 65536
LISTENER = 3


class Memory:
    """Of one page."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    def read(self, at: int, size: int) -> bytes | None:
        return bytes(self.data[at : at + size]) if at + size <= SIZE else None

    def write(self, at: int, data: bytes) -> bool:
        if at + len(data) > SIZE:
            return False
        self.data[at : at + len(data)] = data
        return True

    def view(self, at: int, size: int) -> memoryview | None:
        return memoryview(self.data)[at : at + size] if at + size <= SIZE else None


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    made = Sockets(listen([0]), contextlib.nullcontext)
    yield made
    made.close()


def connected(sockets: Sockets) -> tuple[socket.socket, int]:
    """A client, and the guest's descriptor of its connection."""
    client = socket.create_connection(("127.0.0.1", port(sockets)), 5)
    assert sockets.wait({LISTENER: select.POLLIN}, 5) == {LISTENER: select.POLLIN}
    fd = sockets.accept(LISTENER, 4)
    assert not isinstance(fd, Errno)
    return client, fd


def port(sockets: Sockets) -> int:
    number: int = sockets._entries[LISTENER].sock.getsockname()[1]
    return number


def vector(memory: Memory, at: int, *pieces: tuple[int, int]) -> None:
    memory.write(at, b"".join(struct.pack("<II", *piece) for piece in pieces))


def test_bytes_go_both_ways(sockets: Sockets) -> None:
    memory, calls = Memory(), Calls(sockets, has_directories=False)
    client, fd = connected(sockets)
    with client:
        vector(memory, 0, (100, 3), (200, 10))
        assert calls.fd_read(memory, fd, 0, 2, 16) is Errno.AGAIN
        client.sendall(b"hello")
        sockets.wait({fd: select.POLLIN}, 5)
        assert calls.fd_read(memory, fd, 0, 2, 16) is Errno.SUCCESS
        assert (bytes(memory.data[100:103]), bytes(memory.data[200:202]), memory.data[16]) == (b"hel", b"lo", 5)
        assert calls.fd_write(memory, fd, 0, 1, 16) is Errno.SUCCESS
        assert client.recv(10) == b"hel"
        assert calls.sock_shutdown(memory, fd, 2) is Errno.SUCCESS
        assert client.recv(10) == b""
    assert calls.fd_close(memory, fd) is Errno.SUCCESS
    assert calls.fd_close(memory, fd) is Errno.BADF


def test_who_looks_for_directories_passes_listeners_by(sockets: Sockets) -> None:
    memory = Memory()
    assert Calls(sockets, has_directories=True).fd_prestat_get(memory, LISTENER, 0) is Errno.NOTDIR
    assert Calls(sockets, has_directories=False).fd_prestat_get(memory, LISTENER, 0) is Errno.BADF


def test_what_a_socket_is(sockets: Sockets) -> None:
    memory, calls = Memory(), Calls(sockets, has_directories=False)
    assert calls.fd_fdstat_get(memory, LISTENER, 0) is Errno.SUCCESS
    assert (memory.data[0], memory.data[2]) == (6, 4)
    assert calls.fd_fdstat_set_flags(memory, LISTENER, 0) is Errno.SUCCESS
    assert calls.fd_fdstat_set_flags(memory, LISTENER, 1) is Errno.INVAL
    assert calls.fd_filestat_get(memory, LISTENER, 0) is Errno.SUCCESS
    assert memory.data[16] == 6


@given(name=st.sampled_from(sorted(PARAMETERS)), data=st.data())
def test_no_arguments_do_harm(name: str, data: st.DataObject) -> None:
    """Pointers outside of the memory, descriptors of nobody, counts of any size."""
    pointer = st.one_of(st.integers(0, 64), st.integers(SIZE - 8, SIZE + 8), st.integers(0, (1 << 32) - 1))
    fd = st.sampled_from([LISTENER, LISTENER + 1, FIRST_CONNECTION, (1 << 32) - 1])
    sockets = Sockets(listen([0]), contextlib.nullcontext)
    try:
        memory = Memory()
        memory.data[:64] = data.draw(st.binary(min_size=64, max_size=64))
        arguments = [data.draw(fd), *(data.draw(pointer) for _ in range(PARAMETERS[name] - 1))]
        if name == "fd_fdstat_set_flags":
            arguments[1] &= ~0 if arguments[1] & 4 else 4  # a blocking listener would wait
        answer = function(Calls(sockets, has_directories=True), name)(memory, *arguments)
        assert isinstance(answer, Errno)
    finally:
        sockets.close()


@pytest.mark.parametrize("blocking", ["accept", "poll"])
def test_whatever_waits_is_stopped(sockets: Sockets, blocking: str) -> None:
    sockets.set_flags(LISTENER, 0)
    threading.Timer(0.05, sockets.stop).start()
    begin = time.monotonic()
    waits: dict[str, Callable[[], object]] = {
        "accept": lambda: sockets.accept(LISTENER, 0),
        "poll": lambda: sockets.wait({LISTENER: select.POLLIN}, 60),
    }
    with pytest.raises(Stopped):
        waits[blocking]()
    assert time.monotonic() - begin < 10
    with pytest.raises(Stopped):
        sockets.accept(LISTENER, 0)


def test_closed_listeners_end_a_wait_for_connections(sockets: Sockets) -> None:
    sockets.set_flags(LISTENER, 0)
    threading.Timer(0.05, sockets.close_listeners).start()
    assert sockets.accept(LISTENER, 0) is Errno.INVAL


def test_closed_descriptors_are_ready_at_once(sockets: Sockets) -> None:
    assert sockets.wait({FIRST_CONNECTION: select.POLLIN}, 60) == {FIRST_CONNECTION: select.POLLNVAL}


def test_a_port_that_cannot_be_had_leaves_none_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use") as caught:
            listen([0, number])
        assert caught.value.filename == str(number)
