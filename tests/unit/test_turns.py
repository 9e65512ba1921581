"""The event loop's turns: short, fair, and otherwise as asyncio expects them."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import time
from collections.abc import Iterator

import pytest

from cri_shim.kernel.turns import EVENTS, LOOK, ShortTurns, new_loop


@pytest.fixture
def selector() -> Iterator[ShortTurns]:
    made = ShortTurns()
    yield made
    made.close()


@pytest.fixture
def ready() -> Iterator[list[int]]:
    """Pipes in which there is always something to read."""
    pipes = [os.pipe() for _ in range(EVENTS * 5)]
    for _, write_end in pipes:
        os.write(write_end, b"x")
    yield [read_end for read_end, _ in pipes]
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_each_gets_its_turn_before_one_gets_its_second(selector: ShortTurns, ready: list[int]) -> None:
    for fd in ready:
        selector.register(fd, selectors.EVENT_READ, fd)
    for _ in range(3):
        seen: list[int] = []
        for _ in range(5):
            found = selector.select(0)
            assert len(found) == EVENTS
            seen += [key.data for key, _ in found]
        assert sorted(seen) == sorted(ready)


def test_what_is_not_waited_for_is_not_told(selector: ShortTurns) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        selector.register(ours, selectors.EVENT_READ)
        assert selector.select(-1) == []
        assert selector.select(0.001) == []
        theirs.close()
        assert [kinds for _, kinds in selector.select(None)] == [selectors.EVENT_READ]
        selector.modify(ours, selectors.EVENT_READ | selectors.EVENT_WRITE)
        time.sleep(LOOK)
        assert [kinds for _, kinds in selector.select(0)] == [selectors.EVENT_READ | selectors.EVENT_WRITE]
        time.sleep(LOOK)
        selector.unregister(ours)
        assert selector.select(0) == []


def test_who_has_work_in_hand_does_not_look_again_at_once(selector: ShortTurns) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        selector.register(ours, selectors.EVENT_READ)
        looks = 0
        end = time.monotonic() + 30
        assert selector.select(0) == []
        theirs.close()
        while not selector.select(0):
            looks += 1
            assert time.monotonic() < end
        assert looks
        # Who waits looks.
        assert selector.select(1)


def test_never_back_before_its_time(selector: ShortTurns) -> None:
    begin = time.monotonic()
    assert selector.select(0.0021) == []
    assert time.monotonic() - begin >= 0.0021


def test_what_is_due_comes_before_all_that_is_ready(ready: list[int]) -> None:
    order: list[int | str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def read(fd: int) -> None:
            order.append(fd)
            loop.remove_reader(fd)
            if len(order) == 1:
                loop.call_soon(order.append, "due")
            if len(order) == len(ready) + 1:
                done.set_result(None)

        for fd in ready:
            loop.add_reader(fd, read, fd)
        await done

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
    assert order.index("due") == EVENTS
