"""The log thread on real pipes and real files; a full disk is a file size limit in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.adapters.log_pump import LogPump
from cri_shim.adapters.log_sink import LogFile
from cri_shim.model.errors import FailedPrecondition
from cri_shim.wire.crilog import Stream


@pytest.fixture
def pump() -> Iterator[LogPump]:
    made = LogPump()
    yield made
    made.close()


class Writer:
    """The container's side: the write ends of two pipes that the pump reads."""

    def __init__(self, pump: LogPump, path: Path | None) -> None:
        self.log = LogFile(path)
        self.drained = threading.Event()
        out, self.out = os.pipe2(os.O_CLOEXEC)
        err, self.err = os.pipe2(os.O_CLOEXEC)
        pump.attach(self.log, {Stream.STDOUT: out, Stream.STDERR: err}, self.drained.set)

    def end(self) -> None:
        os.close(self.out)
        os.close(self.err)
        assert self.drained.wait(60)


def contents(path: Path) -> list[tuple[str, str, str]]:
    """Stream, tag and content of each entry."""
    entries = [line.split(" ", 3) for line in path.read_text().splitlines()]
    return [(stream, tag, text) for _, stream, tag, text in entries]


def wait_for(path: Path, text: bytes) -> None:
    deadline = time.monotonic() + 60
    while text not in path.read_bytes():
        assert time.monotonic() < deadline, path.read_bytes()
        time.sleep(0.002)


def test_both_streams_with_tags_until_the_last_byte(pump: LogPump, tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = Writer(pump, path)
    os.write(writer.out, b"first\nsec")
    wait_for(path, b"first")
    os.write(writer.err, b"oops\n")
    wait_for(path, b"oops")
    os.write(writer.out, b"ond\nunterminated")
    writer.end()
    assert contents(path) == [
        ("stdout", "F", "first"),
        ("stderr", "F", "oops"),
        ("stdout", "F", "second"),
        ("stdout", "P", "unterminated"),
    ]


def test_drained_waits_for_both_streams(pump: LogPump, tmp_path: Path) -> None:
    writer = Writer(pump, tmp_path / "log")
    os.close(writer.out)
    assert not writer.drained.wait(0.1)
    os.close(writer.err)
    assert writer.drained.wait(10)


def test_all_that_is_left_at_the_end_is_written_in_one_turn(tmp_path: Path) -> None:
    pump = LogPump(threaded=False)
    epoll = pump.start()
    writer = Writer(pump, tmp_path / "log")
    os.write(writer.out, b"first\n")
    os.write(writer.err, b"second\n")
    os.close(writer.out)
    os.close(writer.err)
    pump.turn(epoll)
    assert writer.drained.is_set()
    assert sorted(text for _, _, text in contents(tmp_path / "log")) == ["first", "second"]
    pump.close()


def test_mode_is_0640_whatever_the_umask(pump: LogPump, tmp_path: Path) -> None:
    path = tmp_path / "log"
    before = os.umask(0o077)
    try:
        writer = Writer(pump, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    writer.end()


def test_a_log_that_exists_is_continued(pump: LogPump, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"earlier\n")
    writer = Writer(pump, path)
    os.write(writer.out, b"later\n")
    writer.end()
    assert path.read_bytes().startswith(b"earlier\n")
    assert path.read_bytes().endswith(b"later\n")


def test_an_unwritable_directory_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        LogFile(tmp_path / "missing" / "log")
    assert caught.value.filename == str(tmp_path / "missing" / "log")


def test_a_flood_comes_out_in_order_and_complete(pump: LogPump, tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = Writer(pump, path)
    lines = 200_000
    data = memoryview(b"".join(b"%06d\n" % number for number in range(lines)))
    while data:
        data = data[os.write(writer.out, data) :]
    writer.end()
    assert [int(line.rsplit(b" ", 1)[1]) for line in path.read_bytes().splitlines()] == list(range(lines))


def test_timestamps_do_not_go_back_when_the_clock_does(
    pump: LogPump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    writer = Writer(pump, path)
    os.write(writer.out, b"before\n")
    wait_for(path, b"before")
    monkeypatch.setattr("cri_shim.adapters.log_pump.time.time_ns", lambda: 0)
    os.write(writer.out, b"after\n")
    writer.end()
    first, second = (line.split()[0] for line in path.read_text().splitlines())
    assert first == second


def test_reopen_sends_all_later_lines_to_the_new_file(pump: LogPump, tmp_path: Path) -> None:
    path, rotated = tmp_path / "log", tmp_path / "log.1"
    writer = Writer(pump, path)
    os.write(writer.out, b"old\n")
    wait_for(path, b"old")
    path.rename(rotated)
    writer.log.reopen()
    os.write(writer.out, b"new\n")
    writer.end()
    assert contents(rotated) == [("stdout", "F", "old")]
    assert contents(path) == [("stdout", "F", "new")]


def test_failed_reopen_leaves_no_file_and_the_old_log_goes_on(pump: LogPump, tmp_path: Path) -> None:
    directory, moved = tmp_path / "logs", tmp_path / "moved"
    directory.mkdir()
    writer = Writer(pump, directory / "log")
    directory.rename(moved)
    with pytest.raises(FileNotFoundError):
        writer.log.reopen()
    os.write(writer.out, b"still here\n")
    writer.end()
    assert contents(moved / "log") == [("stdout", "F", "still here")]
    assert not directory.exists()


def test_a_log_that_is_closed_is_not_reopened(pump: LogPump, tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = Writer(pump, path)
    os.write(writer.out, b"all\n")
    writer.end()
    path.unlink()
    with pytest.raises(FailedPrecondition, match="is closed: the container has ended"):
        writer.log.reopen()
    assert not path.exists()


def test_no_log_path_drains_all_the_same(pump: LogPump) -> None:
    writer = Writer(pump, None)
    os.write(writer.out, b"x" * 4096 * 16)
    os.write(writer.out, b"y" * 4096 * 16)
    writer.end()


FULL_DISK = """
import os, resource, signal, sys, threading
from pathlib import Path
from cri_shim.adapters.log_pump import LogPump
from cri_shim.adapters.log_sink import LogFile
from cri_shim.wire.crilog import Stream

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
pump, log, drained = LogPump(), LogFile(Path(sys.argv[1])), threading.Event()
read, write = os.pipe()
pump.attach(log, {Stream.STDOUT: read}, drained.set)
for number in range(100_000):
    os.write(write, b"line %d\\n" % number)
os.close(write)
assert drained.wait(30)
print(log.dropped)
"""


def test_a_full_disk_drops_text_and_leaves_whole_entries(tmp_path: Path) -> None:
    path = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, check=True, timeout=60)
    entries = path.read_bytes()
    assert 99_000 < len(entries) <= 100_000
    assert int(done.stdout) > 1_000_000
    lines = [line.split(b" ", 3)[3] for line in entries.splitlines()]
    assert lines == [b"line %d" % number for number in range(len(lines))]
    assert entries.endswith(b"\n")


def test_many_containers_share_one_thread_and_one_that_watches_it(pump: LogPump, tmp_path: Path) -> None:
    before = threading.active_count()
    writers = [Writer(pump, tmp_path / str(number)) for number in range(100)]
    assert threading.active_count() <= before + 2
    for number, writer in enumerate(writers):
        os.write(writer.out, b"I am %d\n" % number)
    for writer in writers:
        writer.end()
    assert [contents(tmp_path / str(n)) for n in range(100)] == [[("stdout", "F", f"I am {n}")] for n in range(100)]


def test_no_container_no_thread() -> None:
    before = threading.active_count()
    pump = LogPump()
    assert threading.active_count() <= before  # one that an earlier test has left may go
    pump.close()


def test_closed_twice_and_started_again(tmp_path: Path) -> None:
    pump = LogPump()
    for name in ("first", "second"):
        writer = Writer(pump, tmp_path / name)
        os.write(writer.out, b"here\n")
        writer.end()
        pump.close()
        pump.close()
        assert contents(tmp_path / name) == [("stdout", "F", "here")]
