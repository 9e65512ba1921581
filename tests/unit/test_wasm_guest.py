"""The course of one run of a module, and who is told what: with a program that needs no engine."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import wasmtime

from cri_shim.adapters.log_pump import LogPump
from cri_shim.model.container import Exit
from cri_shim.model.errors import CriShimError
from cri_shim.model.ids import ContainerId, Digest
from handlers.wasmtime.ending import Ending
from handlers.wasmtime.guest import Guest, Linked, Services
from handlers.wasmtime.guest_spec import Entry, GuestSpec
from handlers.wasmtime.output import Plain
from handlers.wasmtime.quota import Throttle

SPEC = GuestSpec(
    entry=Entry("module.wasm", Digest("sha256:" + "0" * 64), "_start"),
    argv=("module.wasm",),
    env=(),
    preopens=(),
    memory_limit=0,
    cpu=None,
    nice=5,
    shares=512,
    cpus=(),
    log_path="",
)


class Course:
    """Writes down what happens: `Told`, `Weight`, and a program that sleeps until it is stopped."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.thread = 0
        self.hurried: list[int] = []
        self.inside, self.over = threading.Event(), threading.Event()
        services = Services(
            LogPump(threaded=False),
            Throttle(),
            self,
            weight=self,
            streams=lambda _: Plain(),  # it waits for nobody
        )
        self.guest = Guest(ContainerId("a" * 64), SPEC, "", services, self.link)

    def link(self, guest: Guest, resources: ExitStack) -> Linked:
        self.events.append("linked")
        return Linked(wasmtime.Store(guest.engine), guest.give_files(lambda _: None, resources), self.execute)

    def execute(self) -> Ending:
        self.thread = threading.get_native_id()
        self.inside.set()
        self.guest.sleep(60)
        return Ending(signal=self.guest.signal)

    def started(self, at: int) -> None:
        self.events.append("started")

    def failed(self, error: CriShimError) -> None:
        self.events.append(f"failed: {error}")

    def ended(self, ended: Exit) -> None:
        self.events.append(f"ended: {ended.code}")
        self.over.set()

    def weigh(self, thread: int, shares: int) -> None:
        self.events.append(f"weigh: {shares}")

    def enter(self) -> None:
        self.events.append("enter")

    def leave(self) -> None:
        self.events.append("leave")

    def hurry(self, thread: int) -> None:
        self.hurried.append(thread)


def test_the_start_is_told_before_the_guest_waits_for_its_turn_among_others() -> None:
    course = Course()
    course.guest.start()
    assert course.inside.wait(10)
    course.guest.stop(15)
    assert course.over.wait(10)
    assert course.events == ["linked", "started", "weigh: 512", "enter", "leave", "ended: 143"]


def test_who_is_to_stop_need_not_wait_for_its_turn() -> None:
    course = Course()
    course.guest.stop(15)  # there is no thread yet
    assert not course.hurried
    course = Course()
    course.guest.start()
    assert course.inside.wait(10)
    course.guest.stop(15)
    assert course.over.wait(10)
    assert course.hurried == [course.thread]
