"""Following a log file through rotations, however fast they come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.adapters.log_file import MAX_BEHIND, FollowedLogs, LogFile
from cri_shim.model.errors import FailedPrecondition, ResourceExhausted
from cri_shim.model.ids import ContainerId


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "0.log"


@pytest.fixture
def log(path: Path) -> Iterator[LogFile]:
    before = len(os.listdir("/proc/self/fd"))
    made = LogFile(path)
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def rotate(path: Path, log: LogFile, content: str, number: int = 0) -> None:
    """As the kubelet and a monitor do it together; nothing of the old name is left."""
    path.rename(path.with_suffix(f".{number}"))
    path.write_text(content)
    log.rotated()
    path.with_suffix(f".{number}").unlink()


def rest(log: LogFile) -> str:
    text = ""
    while (data := log.read()) or log.turn_over():
        text += data.decode()
    return text


def test_no_file_is_left_out(path: Path, log: LogFile) -> None:
    path.write_text("a")
    assert log.open()
    for number in range(20):
        rotate(path, log, f" {number}", number)
    with path.open("a") as file:
        file.write(" end")
    assert rest(log) == "a " + " ".join(map(str, range(20))) + " end"
    assert rest(log) == ""


def test_a_file_is_read_to_its_end_first(path: Path, log: LogFile) -> None:
    path.write_text("old")
    assert log.open()
    assert log.read() == b"old"
    with path.open("a") as file:
        rotate(path, log, "new")
        file.write(", and its last words; ")
    assert not log.turn_over()
    assert rest(log) == ", and its last words; new"


def test_a_rotation_that_was_not_told_is_seen_at_the_path(path: Path, log: LogFile) -> None:
    path.write_text("one")
    assert log.open()
    path.rename(path.with_suffix(".1"))
    assert rest(log) == "one"
    path.write_text(" two")
    assert rest(log) == " two"
    log.rotated()
    assert rest(log) == ""
    rotate(path, log, " three")
    assert rest(log) == " three"


def test_one_that_was_told_and_the_next_one_that_was_not(path: Path, log: LogFile) -> None:
    path.write_text("one")
    assert log.open()
    rotate(path, log, " two")
    path.rename(path.with_suffix(".2"))
    path.write_text(" three")
    assert rest(log) == "one two three"


def test_a_log_that_is_not_there_yet(path: Path, log: LogFile) -> None:
    assert not log.open()
    assert log.read() == b""
    log.rotated()
    path.write_text("one")
    rotate(path, log, " two")
    assert rest(log) == " two"


def test_a_log_that_somebody_empties(path: Path, log: LogFile) -> None:
    path.write_text("a long line")
    assert log.open()
    assert rest(log) == "a long line"
    path.write_text("new")
    assert rest(log) == "new"


def test_a_reader_that_is_too_slow_is_told_so_when_it_has_read_what_was_kept(path: Path, log: LogFile) -> None:
    path.write_text("a")
    assert log.open()
    for number in range(MAX_BEHIND + 3):
        rotate(path, log, "b", number)
    for content in "a" + "b" * MAX_BEHIND:
        assert log.read().decode() == content
        if log._next:
            assert log.turn_over()
    with pytest.raises(ResourceExhausted, match="64 rotations behind"):
        log.turn_over()


def test_what_is_no_file_is_refused(path: Path, log: LogFile) -> None:
    os.mkfifo(path)
    with pytest.raises(FailedPrecondition, match="no regular file"):
        log.open()


def test_a_rotation_after_the_reader_has_left(path: Path, log: LogFile) -> None:
    path.write_text("a")
    log.open()
    log.close()
    log.rotated()


def test_who_follows_which_container(path: Path) -> None:
    followed, one, two = FollowedLogs(), LogFile(path), LogFile(path)
    first, second = ContainerId("1" * 64), ContainerId("2" * 64)
    followed.add(first, one)
    followed.add(first, two)
    assert (followed.of(first), followed.of(second)) == ((one, two), ())
    followed.remove(first, one)
    followed.remove(first, two)
    assert followed.of(first) == ()
