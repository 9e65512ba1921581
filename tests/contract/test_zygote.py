"""The zygote with real children: results, errors, descriptors, deadlines, deaths."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from cri_shim.adapters.zygote import TaskError, Zygote
from cri_shim.model.errors import DeadlineExceeded, Internal

TASK = "zygote_tasks"
SOURCE = """
import os, signal, time
def echo(arguments, fds):
    return {"arguments": arguments, "read": [os.read(fd, 100).decode() for fd in fds]}
def fail(arguments, fds):
    raise OSError(28, "No space left on device")
def pid(arguments, fds):
    return {"pid": os.getpid(), "parent": os.getppid(), "fds": sorted(int(n) for n in os.listdir("/proc/self/fd"))}
def sleep(arguments, fds):
    with open(arguments["mark"], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
def killed(arguments, fds):
    os.kill(os.getpid(), signal.SIGKILL)
def score(arguments, fds):
    return {"score": open("/proc/self/oom_score_adj").read()}
"""


@pytest_asyncio.fixture
async def zygote(tmp_path: Path) -> AsyncIterator[Zygote]:
    (tmp_path / f"{TASK}.py").write_text(SOURCE)
    made = Zygote(search_path=[str(tmp_path), *Zygote().search_path])
    yield made
    await made.aclose()


async def wait_for(path: Path) -> int:
    async with asyncio.timeout(60):
        while not path.exists() or not path.read_text():
            await asyncio.sleep(0.01)
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


async def test_a_task_gets_its_arguments_and_descriptors(zygote: Zygote) -> None:
    ends = [os.pipe() for _ in range(3)]
    for number, (_, write) in enumerate(ends):
        os.write(write, f"pipe {number}".encode())
    arguments = {"text": "\udcff ä", "long": "x" * 1_000_000}
    result = await zygote.run(f"{TASK}:echo", arguments, [read for read, _ in ends], timeout=60)
    assert result == {"arguments": arguments, "read": ["pipe 0", "pipe 1", "pipe 2"]}
    for end in ends:
        os.close(end[0])
        os.close(end[1])


async def test_children_run_side_by_side_and_have_nothing_else_open(zygote: Zygote) -> None:
    results = await asyncio.gather(*(zygote.run(f"{TASK}:pid", {}, timeout=60) for _ in range(20)))
    assert len({result["pid"] for result in results}) == 20
    assert {result["parent"] for result in results} == {zygote.pid}
    assert all(len(result["fds"]) <= 6 for result in results)


async def test_an_exception_comes_back_with_its_errno(zygote: Zygote) -> None:
    with pytest.raises(TaskError, match="fail failed: OSError: No space left") as caught:
        await zygote.run(f"{TASK}:fail", {}, timeout=60)
    assert (caught.value.errno, caught.value.type) == (28, "OSError")
    with pytest.raises(TaskError, match="ModuleNotFoundError"):
        await zygote.run("no_such_module:task", {}, timeout=60)
    with pytest.raises(TaskError, match="AttributeError"):
        await zygote.run(f"{TASK}:no_such_task", {}, timeout=60)


async def test_a_child_that_is_killed_is_named(zygote: Zygote) -> None:
    with pytest.raises(Internal, match="killed was killed by SIGKILL without a result"):
        await zygote.run(f"{TASK}:killed", {}, timeout=60)


async def test_a_deadline_ends_the_child(zygote: Zygote, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    await zygote.start()
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"did not finish within 2 s and was killed"):
        await zygote.run(f"{TASK}:sleep", {"mark": str(mark)}, timeout=2)
    assert time.monotonic() - started < 30
    assert not is_alive(int(mark.read_text()))


async def test_a_cancelled_caller_ends_the_child(zygote: Zygote, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    task = asyncio.ensure_future(zygote.run(f"{TASK}:sleep", {"mark": str(mark)}, timeout=60))
    pid = await wait_for(mark)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_alive(pid)


async def test_a_dead_zygote_is_replaced_and_its_children_go_on(zygote: Zygote, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    task = asyncio.ensure_future(zygote.run(f"{TASK}:sleep", {"mark": str(mark)}, timeout=60))
    child = await wait_for(mark)
    first = zygote.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    while is_alive(first):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert is_alive(child)
    result = await zygote.run(f"{TASK}:pid", {}, timeout=60)
    assert result["parent"] == zygote.pid != first
    os.kill(child, signal.SIGKILL)
    with pytest.raises(Internal, match="ended without a result"):
        await task


async def test_the_zygote_ends_with_its_owner_and_holds_no_lock(tmp_path: Path) -> None:
    (tmp_path / f"{TASK}.py").write_text(SOURCE)
    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    zygote = Zygote([lock], [str(tmp_path), *Zygote().search_path])
    mark = tmp_path / "mark"
    task = asyncio.ensure_future(zygote.run(f"{TASK}:sleep", {"mark": str(mark)}, timeout=60))
    child = await wait_for(mark)
    pid = zygote.pid
    assert pid is not None
    os.close(lock)
    await zygote.aclose()
    assert not is_alive(pid)
    assert is_alive(child)
    again = os.open(tmp_path / "lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(child, signal.SIGKILL)
    with pytest.raises(Internal):
        await task
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)


async def test_children_do_not_inherit_shelter_from_the_oom_killer(zygote: Zygote) -> None:
    assert int((await zygote.run(f"{TASK}:score", {}, timeout=60))["score"]) >= 0


async def test_an_idle_zygote_is_small(zygote: Zygote) -> None:
    await zygote.start()
    await asyncio.sleep(0.3)
    rollup = Path(f"/proc/{zygote.pid}/smaps_rollup").read_text()
    private = sum(
        int(line.split()[1]) for line in rollup.splitlines() if line.startswith(("Private_Dirty", "Private_Clean"))
    )
    assert private < 10 * 1024, rollup
