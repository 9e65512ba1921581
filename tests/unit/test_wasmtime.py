"""The pure parts of the wasmtime handler: weights, signals, exits, and the bytes of poll_oneoff."""

from __future__ import annotations

import signal
import struct

import pytest

from cri_shim.model.container import Exit, Reason
from cri_shim.model.errors import InvalidArgument
from handlers.wasmtime import poll
from handlers.wasmtime.ending import Ending, ends_guest, exit_from
from handlers.wasmtime.errnos import Errno
from handlers.wasmtime.guest_plan import nice_from_shares, parse_cpus
from handlers.wasmtime.module_file import split_entry

NOW = poll.Now(realtime=1_000_000_000, monotonic=5_000)


@pytest.mark.parametrize(
    ("shares", "nice"),
    [(0, 5), (1024, 5), (262_144, 5), (512, 5), (256, 6), (102, 10), (51, 13), (2, 19), (1, 19)],
)
def test_shares_become_a_weight_below_the_daemons(shares: int, nice: int) -> None:
    assert nice_from_shares(shares) == nice


@pytest.mark.parametrize(("text", "cpus"), [("", ()), ("0", (0,)), ("0-2,7", (0, 1, 2, 7)), ("3-3", (3,))])
def test_lists_of_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["x", "1-", "-1", "0-99999999999", "0 1", "²"])
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(InvalidArgument, match="cpuset_cpus"):
        parse_cpus(text)


@pytest.mark.parametrize(
    ("word", "path", "function"),
    [
        ("app.wasm", "app.wasm", "_start"),
        ("/srv/app.wasm#run", "/srv/app.wasm", "run"),
        ("a#b#run", "a#b", "run"),
        ("app.wasm#", "app.wasm#", "_start"),
        ("#run", "#run", "_start"),
    ],
)
def test_entry_points(word: str, path: str, function: str) -> None:
    assert split_entry(word) == (path, function)


def test_signals_act_as_by_default_and_the_stop_signal_always() -> None:
    assert all(ends_guest(n, signal.SIGTERM) for n in (signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGUSR1))
    assert not any(ends_guest(n, signal.SIGTERM) for n in (0, signal.SIGCHLD, signal.SIGCONT, signal.SIGTSTP))
    assert ends_guest(signal.SIGWINCH, signal.SIGWINCH)


@pytest.mark.parametrize(
    ("ending", "ended"),
    [
        (Ending(), Exit(code=0, at=9, reason=Reason.COMPLETED)),
        (Ending(signal=15), Exit(code=143, at=9, reason=Reason.ERROR)),
        (Ending(code=0, signal=15), Exit(code=0, at=9, reason=Reason.COMPLETED)),
        (Ending(code=3), Exit(code=3, at=9, reason=Reason.ERROR)),
        (Ending(code=3, signal=15), Exit(code=3, at=9, reason=Reason.ERROR)),
        (Ending(signal=15, trap="interrupt"), Exit(code=143, at=9, reason=Reason.ERROR)),
        (Ending(signal=9, trap="interrupt", out_of_memory=True), Exit(code=137, at=9, reason=Reason.ERROR)),
        (Ending(trap="bang"), Exit(code=134, at=9, reason=Reason.ERROR, message="bang")),
    ],
)
def test_endings(ending: Ending, ended: Exit) -> None:
    assert exit_from(ending, 9) == ended


@pytest.mark.parametrize("ending", [Ending(code=2, out_of_memory=True), Ending(trap="x", out_of_memory=True)])
def test_an_abnormal_end_at_the_memory_limit_is_oom_killed(ending: Ending) -> None:
    ended = exit_from(ending, 9)
    assert (ended.code, ended.reason) == (137, Reason.OOM_KILLED)


def test_a_long_trap_text_is_cut() -> None:
    assert len(exit_from(Ending(trap="x" * 100_000), 9).message) == 4096


# poll_oneoff: layouts as in the WASI preview 1 witx, written out by hand.


def clock(userdata: int, number: int, timeout: int, flags: int = 0) -> bytes:
    return struct.pack("<QB7xI4xQQH6x", userdata, 0, number, timeout, 0, flags)


def descriptor(userdata: int, kind: int, fd: int) -> bytes:
    return struct.pack("<QB7xI28x", userdata, kind, fd)


def events(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """Userdata, errno, type, bytes, flags."""
    return list(struct.iter_unpack("<QHB5xQH6x", data))


def parsed(subscriptions: bytes) -> poll.Poll:
    call = poll.parse_poll(subscriptions, NOW)
    assert isinstance(call, poll.Poll)
    return call


def test_sizes_are_those_of_the_interface() -> None:
    assert (poll.SUBSCRIPTION_SIZE, poll.EVENT_SIZE) == (48, 32)


def test_the_first_timer_decides_and_all_that_are_due_are_told() -> None:
    call = parsed(clock(1, 1, 300) + clock(2, 1, 100) + clock(3, 1, 100))
    assert call.events(NOW) == b""
    assert call.wait(NOW) == 100
    later = poll.Now(NOW.realtime, NOW.monotonic + 100)
    assert [event[0] for event in events(call.events(later))] == [2, 3]


def test_relative_and_absolute_times_of_both_clocks() -> None:
    assert parsed(clock(1, 0, 50)).wait(NOW) == 50
    assert parsed(clock(1, 0, 1_000_000_070, flags=1)).wait(NOW) == 70
    assert parsed(clock(1, 1, 5_090, flags=1)).wait(NOW) == 90
    assert events(parsed(clock(1, 1, 10, flags=1)).events(NOW)) == [(1, 0, 0, 0, 0)]
    assert parsed(clock(1, 1, 2**64 - 1)).wait(NOW) == 2**64 - 1


def test_descriptors_are_ready_at_once_and_standard_input_is_at_its_end() -> None:
    call = parsed(descriptor(1, 1, 0) + descriptor(2, 2, 1) + descriptor(3, 1, 5) + clock(4, 1, 1000))
    assert events(call.events(NOW)) == [(1, 0, 1, 0, 1), (2, 0, 2, 1, 0), (3, 0, 1, 1, 0)]


def test_clocks_of_cpu_time_are_told_as_unsupported() -> None:
    assert events(parsed(clock(1, 2, 5)).events(NOW)) == [(1, 58, 0, 0, 0)]


@pytest.mark.parametrize("subscriptions", [b"", struct.pack("<QB39x", 1, 9)])
def test_what_is_no_subscription(subscriptions: bytes) -> None:
    assert poll.parse_poll(subscriptions, NOW) is Errno.INVAL
