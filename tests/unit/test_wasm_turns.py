"""How often a guest may call into Python for nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from handlers.wasmtime.turns import Turns


@dataclass
class Clocks:
    """Time and CPU time of the calling thread, in seconds; `late` is how long after a rest it comes back."""

    now: float = 100.0
    spent: float = 3.0
    late: float = 0.0
    stop: bool = False
    rests: list[float] = field(default_factory=list)

    def compute(self, seconds: float) -> None:
        self.now += seconds
        self.spent += seconds

    def sleep(self, seconds: float) -> bool:
        self.rests.append(seconds)
        self.now += seconds + self.late
        return self.stop


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    monkeypatch.setattr(time, "thread_time", lambda: made.spent)
    return made


def ask(turns: Turns, times: int) -> None:
    for _ in range(times):
        assert turns.called(useful=False) is False


def test_a_few_calls_are_free_and_then_each_costs_a_rest(clocks: Clocks) -> None:
    turns = Turns(clocks.sleep)
    ask(turns, 200)
    assert clocks.rests == []
    ask(turns, 1000)
    assert clocks.rests == [0.001] * 1000


def test_who_waits_for_its_turn_has_fewer_free_calls(clocks: Clocks) -> None:
    turns = Turns(clocks.sleep)
    for _ in range(10):
        ask(turns, 1)
        clocks.now += 0.05
    assert len(clocks.rests) >= 5


def test_who_comes_late_to_its_turn_rests_longer_until_it_comes_in_time(clocks: Clocks) -> None:
    turns = Turns(clocks.sleep)
    clocks.late = 0.01
    ask(turns, 210)
    assert clocks.rests == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.064, 0.064, 0.064]
    clocks.late = 0.0001
    ask(turns, 300)
    assert clocks.rests[10:] == sorted(clocks.rests[10:], reverse=True)
    assert clocks.rests[-1] == 0.001


def test_who_does_something_between_them_never_rests(clocks: Clocks) -> None:
    turns = Turns(clocks.sleep)
    for _ in range(2500):
        clocks.now += 1.0  # it waits for a client
        assert turns.called(useful=True) is False
        ask(turns, 4)
    assert clocks.rests == []


def test_who_computes_between_them_never_rests(clocks: Clocks) -> None:
    turns = Turns(clocks.sleep)
    for _ in range(5000):
        clocks.compute(0.0011)
        ask(turns, 1)
    assert clocks.rests == []


def test_a_guest_that_is_to_stop_learns_it(clocks: Clocks) -> None:
    turns = Turns(clocks.sleep)
    ask(turns, 200)
    clocks.stop = True
    assert turns.called(useful=False) is True
