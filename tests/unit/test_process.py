"""Starting, watching and ending processes; none of it needs root."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cri_shim.kernel import libc, process
from cri_shim.kernel.fs import lock_exclusive
from cri_shim.model.errors import DeadlineExceeded, FailedPrecondition

SHELL = "/bin/sh"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a child behind, dead or alive."""
    before = children()
    yield
    assert set(children()) <= set(before)


@pytest.fixture
async def reaper() -> AsyncIterator[process.Reaper]:
    made = process.Reaper()
    made.start(asyncio.get_running_loop())
    yield made
    made.stop()


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(60):
        while any(process.process_start_time(pid) is not None for pid in pids):
            await asyncio.sleep(0.005)


async def test_run_returns_code_and_both_streams() -> None:
    done = await process.run([SHELL, "-c", "cat; echo oops >&2; exit 7"], stdin=b"in", timeout=60)
    assert done == process.Completed((SHELL, "-c", "cat; echo oops >&2; exit 7"), 7, b"in", b"oops\n")


async def test_death_by_signal_is_a_negative_code() -> None:
    assert (await process.run([SHELL, "-c", "kill -TERM $$"], timeout=60)).returncode == -signal.SIGTERM


async def test_large_input_and_output_pass_through_small_pipes() -> None:
    data = os.urandom(3 << 20)
    done = await process.run(["cat"], stdin=data, timeout=10, limit=len(data))
    assert done.stdout == data


async def test_output_over_the_limit_is_drained_and_dropped() -> None:
    done = await process.run(["head", "-c", "5000000", "/dev/zero"], timeout=10, limit=1000)
    assert (done.returncode, len(done.stdout)) == (0, 1000)


async def test_child_that_does_not_read_its_input_is_no_error() -> None:
    assert (await process.run(["true"], stdin=bytes(1 << 20), timeout=60)).returncode == 0


async def test_deadline_kills_the_whole_group_and_names_the_program(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(DeadlineExceeded, match=f"^{SHELL} did not finish within 1 s and was killed$"):
        await process.run([SHELL, "-c", f"sleep 60 & echo $$ $! > {pids}; wait"], timeout=1)
    shell, grandchild = map(int, pids.read_text().split())
    assert process.process_start_time(shell) is None
    await until_gone(grandchild)


async def test_cancellation_kills_and_reaps(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(process.run([SHELL, "-c", f"echo $$ > {pid_file}; exec sleep 60"], timeout=60))
    async with asyncio.timeout(60):
        while not (pid_file.exists() and pid_file.read_text()):
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.process_start_time(int(pid_file.read_text())) is None


async def test_cancellation_before_the_loop_knows_of_the_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(process.run([SHELL, "-c", f"echo $$ > {pid_file}; exec sleep 60"], timeout=60))
    for _ in range(3):
        await asyncio.sleep(0)
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.process_start_time(int(pid_file.read_text())) is None


async def test_cancellation_while_the_entering_thread_still_starts_the_child(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    command = [SHELL, "-c", f"sleep 0.3; touch {marker}"]
    task = asyncio.create_task(process.run(command, timeout=60, enter=lambda: time.sleep(0.1)))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.6)
    assert not marker.exists()


async def test_daemonised_grandchild_that_holds_the_pipes_does_not_hold_the_caller() -> None:
    started = time.monotonic()
    done = await process.run([SHELL, "-c", "sleep 60 & echo $!"], timeout=50)
    assert time.monotonic() - started < 30
    os.kill(int(done.stdout), signal.SIGKILL)


@pytest.mark.parametrize("enter", [None, lambda: None])
async def test_missing_program_is_named_with_a_hint(enter: None) -> None:
    with pytest.raises(FailedPrecondition, match="program no-such-program is missing on this node; install it"):
        await process.run(["no-such-program"], timeout=5, enter=enter)


async def test_program_that_is_no_program(tmp_path: Path) -> None:
    text = tmp_path / "plain"
    text.write_text("text")
    with pytest.raises(FailedPrecondition, match=f"cannot execute {text}: Permission denied"):
        await process.run([text], timeout=60)


async def test_missing_working_directory_is_not_blamed_on_the_program(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        await process.run(["true"], timeout=5, cwd=tmp_path / "nowhere")


async def test_service_manager_variables_do_not_reach_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("KEPT", "yes")
    words = (await process.run(["env"], timeout=60)).stdout.decode().splitlines()
    assert "KEPT=yes" in words
    assert not [word for word in words if word.startswith("NOTIFY_SOCKET")]


async def test_only_named_descriptors_are_inherited() -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        done = await process.run(["ls", "/proc/self/fd"], timeout=5, pass_fds=[read])
    finally:
        os.close(read)
        os.close(write)
    assert b"%d" % read in done.stdout.split()
    assert b"%d" % write not in done.stdout.split()


async def test_short_lived_children_hold_the_inflight_lock(tmp_path: Path) -> None:
    lock, begun, end = (tmp_path / name for name in ("inflight.lock", "begun", "end"))
    fd = lock_exclusive(lock)
    assert fd is not None
    process.set_inflight_fd(fd)
    try:
        script = f"touch {begun}; until [ -e {end} ]; do sleep 0.05; done"
        task = asyncio.create_task(process.run([SHELL, "-c", script], timeout=60))
        async with asyncio.timeout(60):
            while not begun.exists():
                await asyncio.sleep(0.005)
    finally:
        process.set_inflight_fd(-1)
        os.close(fd)
    assert lock_exclusive(lock) is None
    end.touch()
    await task
    again = lock_exclusive(lock)
    assert again is not None
    os.close(again)


async def test_spawn_keeps_the_inflight_lock_to_itself(tmp_path: Path) -> None:
    fd = lock_exclusive(tmp_path / "inflight.lock")
    assert fd is not None
    process.set_inflight_fd(fd)
    try:
        child = process.spawn(["sleep", "60"])
    finally:
        process.set_inflight_fd(-1)
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)
    links = []
    for link in Path(f"/proc/{child.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # what the loader of the program has just closed
            links.append(str(link.readlink()))
    assert str(tmp_path / "inflight.lock") not in links
    child.kill()
    assert await child.wait() == -signal.SIGKILL


async def test_wait_serves_several_waiters_and_again_later() -> None:
    child = process.spawn([SHELL, "-c", "sleep 0.1; exit 3"])
    assert {await waiter for waiter in asyncio.as_completed([child.wait(), child.wait()])} == {3}
    assert await child.wait() == 3
    assert child.pidfd == -1
    child.kill()


async def test_cancelled_waiter_does_not_disturb_the_others() -> None:
    child = process.spawn(["sleep", "0.2"])
    impatient = asyncio.create_task(child.wait())
    await asyncio.sleep(0.01)
    impatient.cancel()
    assert await child.wait() == 0


async def test_child_made_in_a_worker_thread_is_watched_by_the_loop() -> None:
    child = await asyncio.to_thread(process.spawn, ["true"])
    assert await child.wait() == 0


async def test_children_do_not_share_the_terminals_process_group() -> None:
    child = process.spawn(["sleep", "60"])
    assert os.getpgid(child.pid) == child.pid
    child.kill(signal.SIGTERM)
    assert await child.wait() == -signal.SIGTERM


async def test_adopted_stranger_has_an_unknown_exit() -> None:
    helper = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess as s; p = s.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()",
        ],
        stdout=subprocess.PIPE,
    )
    assert helper.stdout is not None
    stranger = process.adopt(int(helper.stdout.readline()))
    stranger.kill()
    assert await stranger.wait() == process.UNKNOWN_EXIT
    helper.wait()
    helper.stdout.close()


async def test_adopting_nobody_fails() -> None:
    with pytest.raises(ProcessLookupError):
        process.adopt(2**22 - 1)


async def test_reaper_takes_orphans_and_leaves_claimed_children(reaper: process.Reaper) -> None:
    claimed = subprocess.Popen(["true"])
    reaper.claim(claimed.pid)
    orphans = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(20)]
    await asyncio.sleep(0.1)  # the claimed one is first in the kernel's list and hides the others
    reaper.unclaim(claimed.pid)
    await until_gone(claimed.pid, *orphans)
    claimed.wait()


async def test_reaper_waits_while_a_start_is_pending(reaper: process.Reaper) -> None:
    with reaper.hold():
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 9"], {})
        await asyncio.sleep(0.1)
        child = process.adopt(pid)
    assert await child.wait() == 9


async def test_thousands_of_quick_children_leak_nothing(reaper: process.Reaper) -> None:
    del reaper
    await process.run(["true"], timeout=60)
    before = descriptors()
    for _ in range(40):
        batch = [process.run(["true"], stdin=b"x", timeout=20) for _ in range(50)]
        assert {done.returncode for done in await asyncio.gather(*batch)} == {0}
    # Fewer is no leak: what an earlier test left to the collector may go meanwhile.
    assert descriptors() <= before


async def test_failed_starts_leak_nothing() -> None:
    before = descriptors()
    for _ in range(20):
        with pytest.raises(FailedPrecondition):
            await process.run(["no-such-program"], stdin=b"x", timeout=60)
    assert descriptors() <= before


def test_text_prefers_stderr_and_is_short() -> None:
    assert process.Completed(("x",), 1, b" out\n", b" \n").text() == "out"
    assert process.Completed(("x",), 1, b"out", b" bad \xff\n").text() == "bad �"
    long = process.Completed(("x",), 1, b"", b"a" * 9000 + b"end").text()
    assert len(long) <= 501
    assert long.endswith("end")


def test_start_time_names_a_process_for_ever() -> None:
    assert process.process_start_time(os.getpid()) == process.process_start_time(os.getpid())
    assert process.process_start_time(2**22 - 1) is None


async def test_find_processes_by_command_line() -> None:
    command = ["sleep", f"61.{os.getpid()}"]  # another run on this machine has another
    child = process.spawn(command)
    while not (found := process.find_processes(lambda words: words == command)):
        await asyncio.sleep(0.01)  # execve lets its parent go on before the new command line is in place
    child.kill()
    await child.wait()
    assert found == [child.pid]
    assert process.find_processes(lambda words: words == command) == []


async def test_a_child_has_what_it_is_given_and_nothing_else(tmp_path: Path) -> None:
    given = os.open(tmp_path, os.O_RDONLY)
    other = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(other, True)  # as a library may do it
    try:
        done = await process.run([SHELL, "-c", "ls -l /proc/$$/fd"], timeout=5, pass_fds=(given,))
    finally:
        os.close(given)
        os.close(other)
    found = {line.split()[8]: line.split()[-1] for line in done.stdout.decode().splitlines() if " -> " in line}
    assert found.keys() == {"0", "1", "2", str(given)}
    assert (found["0"], found[str(given)]) == ("/dev/null", str(tmp_path))


async def test_a_child_ignores_no_signal() -> None:
    """Python ignores SIGPIPE; glibc would let the child ignore two that it uses itself."""
    done = await process.run([SHELL, "-c", "grep SigIgn /proc/self/status"], timeout=60)
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN
    assert done.stdout == b"SigIgn:\t0000000000000000\n"


async def test_the_path_is_that_of_the_environment_of_the_child(tmp_path: Path) -> None:
    program = tmp_path / "greet"
    program.write_text("#!/bin/sh\necho $GREETING\n")
    program.chmod(0o755)
    done = await process.run(["greet"], timeout=5, env={"PATH": f"/nowhere:{tmp_path}", "GREETING": "hello"})
    assert done.stdout == b"hello\n"
    with pytest.raises(FailedPrecondition, match="program greet is missing"):
        await process.run(["greet"], timeout=5, env={"PATH": "/nowhere"})


async def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        await process.run([SHELL, "-c", "pwd"], timeout=5, cwd=tmp_path / "nowhere")
    done = await process.run(["pwd"], timeout=5, cwd=tmp_path)
    assert done.stdout.decode().strip() == str(tmp_path)
    with pytest.raises(ValueError, match="null"):
        await process.run(["echo", "a\0b"], timeout=60)


def test_streams_of_a_parent_that_has_none_of_its_own() -> None:
    """A service that was started with its first descriptors closed: pipes have their numbers."""
    script = """if True:
        import os
        from cri_shim.kernel import process
        result = os.dup(1)
        os.closerange(0, 3)
        read_end, write_end = os.pipe()
        other = os.dup(write_end)
        assert (read_end, write_end, other) == (0, 1, 2)
        child = process.spawn(["sh", "-c", "echo out; echo err >&2"], stdout=other, stderr=write_end)
        os.waitpid(child.pid, 0)
        os.write(result, b"".join(sorted(os.read(read_end, 100).splitlines(True))))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=30)
    assert (done.stdout, done.stderr) == (b"err\nout\n", b"")


async def test_before_linux_5_11_descriptors_are_closed_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(first: int) -> None:
        raise OSError(errno.EINVAL, "close_range")

    monkeypatch.setattr(libc, "close_range_on_exec", missing)
    await test_a_child_has_what_it_is_given_and_nothing_else(tmp_path)
