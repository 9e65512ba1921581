"""Jobs in a row as long as they are short, and no job that another one can hold up."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from cri_shim.kernel import lane
from cri_shim.kernel.lane import THREADS, Lane

_LONG = 60.0


def lanes() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lane"]


def use_lane(patience: float = lane.PATIENCE) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(Lane(loop, patience))


async def hanging(number: int) -> tuple[threading.Event, list[asyncio.Task[bool]]]:
    """So many jobs that have begun, and what lets them end."""
    end, begun = threading.Event(), [threading.Event() for _ in range(number)]

    def hang(mine: threading.Event) -> bool:
        mine.set()
        return end.wait(_LONG)

    tasks = [asyncio.create_task(asyncio.to_thread(hang, mine)) for mine in begun]
    while not all(mine.is_set() for mine in begun):
        await asyncio.sleep(0.001)
    return end, tasks


async def test_short_jobs_come_one_after_another() -> None:
    use_lane(_LONG)
    done: list[int] = []
    at_once, most = 0, 0

    def job(number: int) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.0001)
        done.append(number)
        at_once -= 1

    await asyncio.gather(*(asyncio.to_thread(job, number) for number in range(50)))
    assert done == list(range(50))
    assert most == 1
    assert len(lanes()) == 1


async def test_a_job_that_hangs_holds_up_nobody() -> None:
    use_lane()
    end, tasks = await hanging(THREADS - 1)
    assert await asyncio.gather(*(asyncio.to_thread(lambda: True) for _ in range(20))) == [True] * 20
    assert not any(task.done() for task in tasks)
    end.set()
    assert all(await asyncio.gather(*tasks))


async def test_when_all_threads_hang_the_next_job_comes_after_one_of_them() -> None:
    use_lane()
    end, tasks = await hanging(THREADS)
    waiting = asyncio.create_task(asyncio.to_thread(lambda: True))
    await asyncio.wait((waiting,), timeout=0.02)
    assert not waiting.done()
    assert len(lanes()) == THREADS
    end.set()
    assert await waiting
    await asyncio.gather(*tasks)
    async with asyncio.timeout(_LONG):
        while len(lanes()) > THREADS / 2:  # those that have nothing to do go
            await asyncio.sleep(0.001)


async def test_errors_arrive_and_what_is_cancelled_is_left_out() -> None:
    use_lane(_LONG)
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(lambda: 1 / 0)
    end, (first,) = await hanging(1)
    ran: list[int] = []
    others = [asyncio.create_task(asyncio.to_thread(ran.append, number)) for number in range(3)]
    await asyncio.sleep(0)
    others[1].cancel()
    await asyncio.wait((others[1],))
    end.set()
    await asyncio.gather(first, others[0], others[2])
    assert ran == [0, 2]


def test_the_end_waits_for_jobs_but_not_for_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    end, done = threading.Event(), threading.Event()

    async def main() -> None:
        use_lane()
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, time.sleep, 0.05)
        loop.run_in_executor(None, done.set)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert done.is_set()
    assert not lanes()
    monkeypatch.setattr(lane, "_CLOSE_SECONDS", 0.05)

    async def left_hanging() -> None:
        use_lane()
        asyncio.get_running_loop().run_in_executor(None, end.wait, _LONG)
        await asyncio.sleep(0)

    before = time.monotonic()
    asyncio.run(left_hanging())
    assert time.monotonic() - before < _LONG / 2
    end.set()
    for thread in lanes():
        thread.join()
