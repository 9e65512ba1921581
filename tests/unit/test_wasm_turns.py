"""How often a guest may call into Python for nothing."""

from __future__ import annotations

import time

import pytest

from handlers.wasmtime import turns
from handlers.wasmtime.turns import Turns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds; a sleep moves it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def rested(now: list[float], useless: int, *, stop: bool = False, useful_every: int = 0) -> float:
    """Seconds of rest in so many calls that take no time."""
    begin = now[0]

    def sleep(seconds: float) -> bool:
        now[0] += seconds
        return stop

    taken = Turns(sleep)
    for number in range(useless):
        if useful_every and number % useful_every == 0:
            assert taken.called(useful=True) is False
        if taken.called(useful=False):
            assert stop
            break
    return now[0] - begin


def test_a_few_calls_are_free_and_then_each_costs_a_rest(clock: list[float]) -> None:
    assert rested(clock, 200) == 0
    assert rested(clock, 1200) == pytest.approx(1.0)


def test_the_more_rest_the_longer(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_resting", 99)
    assert rested(clock, 300) == pytest.approx(100 * 0.05)
    assert turns._resting == 99


def test_who_does_something_between_them_never_rests(clock: list[float]) -> None:
    assert rested(clock, 10_000, useful_every=4) == 0


def test_who_asks_seldom_never_rests(clock: list[float]) -> None:
    taken = Turns(lambda seconds: pytest.fail(f"rests for {seconds} s"))
    for _ in range(5000):
        clock[0] += 0.0011
        taken.called(useful=False)


def test_a_guest_that_is_to_stop_learns_it(clock: list[float]) -> None:
    assert rested(clock, 1000, stop=True) == pytest.approx(0.001)
