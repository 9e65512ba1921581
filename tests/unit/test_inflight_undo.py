"""Joining running work, and undoing what a failed flow has made."""

from __future__ import annotations

import asyncio

import pytest

from cri_shim.flows.inflight import InFlight
from cri_shim.flows.undo import Undo


async def test_equal_keys_share_one_run_and_its_result() -> None:
    runs = 0
    group: InFlight[str, int] = InFlight()

    async def work() -> int:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0.01)
        return runs

    assert await asyncio.gather(*(group.join("k", work) for _ in range(10))) == [1] * 10
    assert "k" not in group
    assert await group.join("k", work) == 2


async def test_a_callers_cancellation_does_not_end_the_work() -> None:
    done = asyncio.Event()
    group: InFlight[str, None] = InFlight()

    async def work() -> None:
        await asyncio.sleep(0.02)
        done.set()

    caller = asyncio.create_task(group.join("k", work))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await group.drain()
    assert done.is_set()


async def test_the_last_one_to_leave_cancels_where_asked() -> None:
    cancelled = asyncio.Event()
    group: InFlight[str, None] = InFlight(cancel_when_abandoned=True)

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    callers = [asyncio.create_task(group.join("k", work)) for _ in range(2)]
    await asyncio.sleep(0.01)
    callers[0].cancel()
    await asyncio.sleep(0.01)
    assert not cancelled.is_set()
    callers[1].cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    await asyncio.wait_for(cancelled.wait(), 1)
    assert "k" not in group


async def test_failures_go_to_everybody() -> None:
    group: InFlight[str, None] = InFlight()

    async def work() -> None:
        await asyncio.sleep(0.01)
        raise ValueError("no")

    results = await asyncio.gather(*(group.join("k", work) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, ValueError) for result in results)


async def test_undo_runs_every_step_last_first_whatever_fails() -> None:
    order: list[str] = []

    async def step(name: str, *, fails: bool = False) -> None:
        order.append(name)
        if fails:
            raise OSError("stuck")

    undo = Undo("flow")

    async def flow() -> None:
        async with undo:
            undo.push("one", lambda: step("one"))
            undo.push("two", lambda: step("two", fails=True))
            undo.push("three", lambda: step("three"))
            raise ValueError("cause")

    with pytest.raises(ValueError, match="cause"):
        await flow()
    assert order == ["three", "two", "two", "one"]
    assert undo.failures == ["two: stuck"]


async def test_success_undoes_nothing() -> None:
    async with Undo("flow") as undo:
        undo.push("never", lambda: pytest.fail("undone"))


async def test_cancellation_does_not_cut_the_undo_short() -> None:
    undone = asyncio.Event()

    async def slow() -> None:
        await asyncio.sleep(0.05)
        undone.set()

    async def flow() -> None:
        async with Undo("flow") as undo:
            undo.push("slow", slow)
            await asyncio.sleep(60)

    task = asyncio.create_task(flow())
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone.is_set()
