"""The one call to systemd: its bytes, the answers, and a manager that does not behave."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_shim.kernel import systemd
from cri_shim.wire import dbus

# By hand, as the specification lays it out.
FIELDS = (
    b"\x01\x01o\0" + b"\x19\0\0\0/org/freedesktop/systemd1\0" + bytes(6)
    + b"\x02\x01s\0" + b"\x20\0\0\0org.freedesktop.systemd1.Manager\0" + bytes(7)
    + b"\x03\x01s\0" + b"\x12\0\0\0StartTransientUnit\0" + bytes(5)
    + b"\x08\x01g\0" + b"\x10ssa(sv)a(sa(sv))\0"
)  # fmt: skip
BODY = (
    b"\x07\0\0\0a.scope\0" + b"\x04\0\0\0fail\0" + bytes(3)
    + b"\x48\0\0\0" + bytes(4)
    + b"\x05\0\0\0Slice\0\x01s\0" + bytes(3) + b"\x07\0\0\0b.slice\0" + bytes(4)
    + b"\x04\0\0\0PIDs\0\x02au\0" + bytes(3) + b"\x04\0\0\0" + b"\x2a\0\0\0"
    + b"\x01\0\0\0B\0\x01b\0" + bytes(3) + b"\x01\0\0\0"
    + bytes(4) + bytes(4)  # an array is padded to its elements even if it has none
)  # fmt: skip
OK = b"OK 0123456789abcdef0123456789abcdef\r\n"
RETURN = b"l\x02\x01\x01\0\0\0\0\x01\0\0\0\0\0\0\0"
SIGNAL = b"l\x04\x01\x01\0\0\0\0\x01\0\0\0\0\0\0\0"


def error(text: bytes) -> bytes:
    body = struct.pack("<I", len(text)) + text + b"\0"
    return struct.pack("<cBBBIII", b"l", 3, 1, 1, len(body), 1, 5) + b"\x05\x01u\0\x01" + bytes(3) + body


def test_the_call_is_laid_out_as_the_specification_says() -> None:
    message = dbus.start_scope("a.scope", {"Slice": "b.slice", "PIDs": (42,), "B": True})
    head = struct.pack("<cBBBIII", b"l", 1, 0, 1, len(message) - 16 - -(-len(FIELDS) // 8) * 8, 1, len(FIELDS))
    assert message[: len(head)] == head
    assert message[16 : 16 + len(FIELDS)] == FIELDS
    assert len(message) == 16 + dbus.rest_of(message[:16])
    assert message[16 + -(-len(FIELDS) // 8) * 8 :] == BODY


def test_values_of_all_types_and_the_other_call() -> None:
    message = dbus.set_properties("a.scope", {"M": 1 << 40, "C": b"\x05", "B": False})
    assert len(message) == 16 + dbus.rest_of(message[:16])
    assert b"\x11\0\0\0SetUnitProperties\0" in message
    # By hand again: the array is padded to 8, and so is the number in it.
    body = (
        b"\x07\0\0\0a.scope\0" + b"\x01\0\0\0"
        + b"\x40\0\0\0" + bytes(4)
        + b"\x01\0\0\0M\0\x01t\0" + bytes(7) + b"\0\0\0\0\0\x01\0\0"
        + b"\x01\0\0\0C\0\x02ay\0" + bytes(2) + b"\x01\0\0\0\x05" + bytes(7)
        + b"\x01\0\0\0B\0\x01b\0" + bytes(3) + b"\0\0\0\0"
    )  # fmt: skip
    assert message.endswith(body)


def test_answers() -> None:
    assert dbus.parse(RETURN) == dbus.Answer(None)
    assert dbus.parse(error(b"Unit exists.")) == dbus.Answer("Unit exists.")
    assert dbus.parse(SIGNAL) is None
    assert dbus.parse(b"l\x03\x01\x01" + bytes(12)) == dbus.Answer("no reason given")


@given(st.binary(max_size=64))
def test_any_bytes_are_an_answer_or_no_message(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        dbus.rest_of(data)
        dbus.parse(data)


@contextlib.contextmanager
def manager(path: Path, serve: Callable[[socket.socket], object]) -> Iterator[None]:
    """A peer that takes one connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            with listener.accept()[0] as peer:
                serve(peer)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join()


def answering(*answers: bytes) -> Callable[[socket.socket], None]:
    def serve(peer: socket.socket) -> None:
        for answer in answers:
            peer.recv(4096)
            peer.sendall(answer)

    return serve


def test_a_scope_is_made(tmp_path: Path) -> None:
    heard = bytearray()

    def serve(peer: socket.socket) -> None:
        heard.extend(peer.recv(4096))
        peer.sendall(OK)
        while b"StartTransientUnit" not in heard:
            heard.extend(peer.recv(4096))
        peer.sendall(SIGNAL + RETURN)

    with manager(tmp_path / "m", serve):
        systemd.start_scope("x.scope", 7, "y.slice", description="of a test", manager=tmp_path / "m")
    assert heard.startswith(b"\0AUTH EXTERNAL ")
    assert b"\r\nBEGIN\r\nl\x01" in heard
    assert b"x.scope" in heard
    assert b"y.slice" in heard


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([OK, error(b"Unit x.scope was already loaded.")], "systemd refuses x.scope: Unit x.scope was already loaded"),
        ([b"REJECTED\r\n"], "does not take our credentials"),
        ([b""], "does not take our credentials"),
        ([OK, b"no message at all"], "not a D-Bus message"),
        ([OK, b"l\x02"], "not a D-Bus message"),
    ],
)
def test_a_manager_that_refuses(tmp_path: Path, answers: list[bytes], message: str) -> None:
    with manager(tmp_path / "m", answering(*answers)), pytest.raises(OSError, match=message):
        systemd.start_scope("x.scope", 7, "y.slice", description="of a test", manager=tmp_path / "m")


def test_a_manager_that_hangs_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "_SECONDS", 0.1)
    with manager(tmp_path / "m", lambda peer: peer.recv(4096) and peer.recv(4096)), pytest.raises(TimeoutError):
        systemd.start_scope("x.scope", 7, "y.slice", description="of a test", manager=tmp_path / "m")
    with pytest.raises(FileNotFoundError):
        systemd.start_scope("x.scope", 7, "y.slice", description="of a test", manager=tmp_path / "none")
