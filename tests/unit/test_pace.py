"""Turns for those who start something."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from cri_shim.adapters.pace import Pace, pace_of_this_machine


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_so_many_at_once_and_in_order() -> None:
    pace, gate, order = Pace(2), asyncio.Semaphore(0), []

    async def start(name: int) -> None:
        async with pace.turn():
            order.append(name)
            await gate.acquire()

    tasks = [asyncio.create_task(start(name)) for name in range(5)]
    await settled()
    assert order == [0, 1]
    for begun in (3, 4, 5):
        gate.release()
        await settled()
        assert order == list(range(begun))
    gate.release()
    gate.release()
    await asyncio.gather(*tasks)


async def test_one_that_leaves_while_it_waits_takes_no_turn() -> None:
    pace = Pace(1)
    async with pace.turn():
        waiting = asyncio.create_task(pace.turn().__aenter__())
        await settled()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(60), pace.turn():
        pass


async def test_one_that_fails_gives_its_turn_back() -> None:
    pace = Pace(1)
    for _ in range(3):
        with pytest.raises(OSError, match="no"):
            async with asyncio.timeout(60), pace.turn():
                raise OSError("no")


async def test_one_that_hangs_holds_nobody_up_and_gives_back_one_turn_only() -> None:
    pace = Pace(1, patience=0.01)
    async with asyncio.timeout(60):
        async with pace.turn(), pace.turn(), pace.turn():
            pass
        async with contextlib.AsyncExitStack() as held:
            patient = Pace(1, patience=3600)
            await held.enter_async_context(patient.turn())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02), patient.turn():
                    pass
    assert [pace._free._value, pace_of_this_machine()._free._value > 1] == [1, True]
