"""Exec and attach in Linux containers with real runtimes and conmon; the client is in memory, and so says all it sees.

Not the protocols between a client and the daemon (`tests/e2e/test_streaming.py`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cri_shim.flows import attach
from cri_shim.flows import exec as further
from cri_shim.model.container import User
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import ContainerPlan
from cri_shim.model.streams import TerminalSize
from tests.contract.handler_suite import Bench, until
from tests.contract.oci_bench import oci_bench
from tests.support.client import MemoryClient

pytestmark = pytest.mark.root

MEGABYTE = os.urandom(1 << 20)


@pytest.fixture(params=["runc", "crun"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path, run_name: str) -> AsyncIterator[Bench]:
    async with oci_bench(request.param, tmp_path, run_name) as made:
        yield made


async def within(seconds: float, steps: Coroutine[Any, Any, int]) -> int:
    async with asyncio.timeout(seconds):
        return await steps


def execute(
    bench: Bench, plan: ContainerPlan, client: MemoryClient, *args: str, tty: bool = False
) -> asyncio.Task[int]:
    command = further.Command(bench.handler, plan.id, args, tty)
    return asyncio.ensure_future(within(20, further.serve(command, client)))


def join(bench: Bench, plan: ContainerPlan, client: MemoryClient) -> asyncio.Task[int]:
    return asyncio.ensure_future(within(60, attach.serve(bench.handler, plan.id, client)))


@pytest.fixture
async def plan(bench: Bench) -> ContainerPlan:
    return await bench.run(("sleep", "1000"))


def with_input(bench: Bench, script: str, *, once: bool = False, tty: bool = False) -> ContainerPlan:
    plan = bench.plan(("sh", "-c", script))
    plan.config.stdin, plan.config.stdin_once, plan.config.tty = True, once, tty
    return dataclasses.replace(plan, process=dataclasses.replace(plan.process, tty=tty, stdin=True, stdin_once=once))


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def members(bench: Bench, plan: ContainerPlan) -> int:
    return len(bench.cgroups.processes(bench.cgroup_parent, plan.id))


class TestExec:
    async def test_streams_are_apart_and_the_status_is_the_commands(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient(stdout=True, stderr=True)
        assert await execute(bench, plan, client, "sh", "-c", "echo out; echo err >&2; exit 7") == 7
        assert (bytes(client.out.data), bytes(client.err.data)) == (b"out\n", b"err\n")

    @pytest.mark.parametrize(("script", "status"), [("kill -9 $$", 137), ("kill -TERM $$", 143), ("exit 255", 255)])
    async def test_signals(self, bench: Bench, plan: ContainerPlan, script: str, status: int) -> None:
        assert await execute(bench, plan, MemoryClient(), "sh", "-c", script) == status

    async def test_a_megabyte_each_way(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient(stdin=True)
        client.keys.type(MEGABYTE)
        client.keys.end()
        assert await execute(bench, plan, client, "cat") == 0
        assert digest(client.out.data) == digest(MEGABYTE)

    async def test_input_that_nobody_wants_is_taken(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient(stdin=True)
        client.keys.type(MEGABYTE)
        running = execute(bench, plan, client, "sh", "-c", "exec <&-; echo closed; sleep 0.3")
        await client.out.shows(b"closed")
        await until(client.keys._pieces.empty)
        assert await running == 0

    async def test_without_output_streams_the_output_is_dropped(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient(stdin=True, stdout=False)
        client.keys.end()
        assert await execute(bench, plan, client, "dd", "if=/dev/zero", "bs=1024k", "count=4") == 0

    @pytest.mark.parametrize(("program", "status"), [("/nowhere", 127), ("/bin/broken", 126)])
    async def test_what_cannot_be_executed_is_said_as_a_shell_does(
        self, bench: Bench, plan: ContainerPlan, program: str, status: int
    ) -> None:
        client = MemoryClient(stderr=True)
        assert await execute(bench, plan, client, program) == status
        assert program.encode() in client.err.data
        assert client.err.data.endswith(b"\n")

    async def test_a_container_that_has_ended_is_an_error(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.exits(0))
        await bench.end_of(plan)
        with pytest.raises(FailedPrecondition, match="not running"):
            await execute(bench, plan, MemoryClient(), "true")

    @pytest.mark.parametrize("tty", [False, True])
    async def test_a_client_that_leaves_ends_the_tree(self, bench: Bench, plan: ContainerPlan, tty: bool) -> None:
        before = members(bench, plan)
        client = MemoryClient(stdin=True)
        script = "trap '' HUP; sh -c 'sleep 1000 & sleep 1000' & echo begun; sleep 1000"
        running = execute(bench, plan, client, "sh", "-c", script, tty=tty)
        await client.out.shows(b"begun")
        await until(lambda: members(bench, plan) >= before + 3)
        client.leave()
        await running
        assert members(bench, plan) == before

    async def test_a_cancelled_session_ends_the_tree(self, bench: Bench, plan: ContainerPlan) -> None:
        before = members(bench, plan)
        client = MemoryClient()
        running = execute(bench, plan, client, "sh", "-c", "echo begun; sleep 1000; true")
        await client.out.shows(b"begun")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert members(bench, plan) == before

    async def test_a_client_that_leaves_at_once(self, bench: Bench, plan: ContainerPlan) -> None:
        before = members(bench, plan)
        client = MemoryClient()
        client.leave()
        await execute(bench, plan, client, "sleep", "1000")
        assert members(bench, plan) == before

    async def test_a_daemon_that_keeps_the_output_holds_up_nobody(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient()
        script = "(while :; do echo more; usleep 20000; done) & echo begun; exit 3"
        assert await execute(bench, plan, client, "sh", "-c", script) == 3
        assert b"begun\n" in client.out.data

    async def test_a_slow_client_stops_the_process_and_gets_all(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient()
        client.out.room.clear()
        running = execute(bench, plan, client, "sh", "-c", "dd if=/dev/zero bs=1k count=3000 2>/dev/null; exit 5")
        await asyncio.sleep(1.5)  # longer than what is granted to a daemon that keeps the output
        assert not running.done()
        client.out.room.set()
        assert await running == 5
        assert len(client.out.data) == 3000 << 10

    async def test_output_of_a_short_life_reaches_a_slow_client(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient()
        client.out.room.clear()
        running = execute(bench, plan, client, "dd", "if=/dev/zero", "bs=1k", "count=60")
        await asyncio.sleep(1.5)
        client.out.room.set()
        assert await running == 0
        assert len(client.out.data) == 60 << 10


class TestTerminal:
    async def test_it_is_a_terminal_of_the_clients_size(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient(stdin=True)
        client.window.put_nowait(TerminalSize(100, 40))
        script = """until [ "$(stty size 2>/dev/null)" = "40 100" ]; do :; done
            trap 'stty size' WINCH; stty size; tty; echo $TERM; echo err >&2
            until read -r line; do :; done; echo got $line"""
        running = execute(bench, plan, client, "sh", "-c", script, tty=True)
        await client.out.shows(b"err")
        assert client.out.data.replace(b"\r", b"").split()[:5] == [b"40", b"100", b"/dev/pts/0", b"xterm", b"err"]
        client.window.put_nowait(TerminalSize(120, 50))
        await client.out.shows(b"50 120")
        client.keys.type(b"it\n")
        assert await running == 0
        assert b"got it" in client.out.data

    async def test_a_client_without_a_size(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient()
        assert (
            await execute(bench, plan, client, "sh", "-c", "test -t 0 && test -t 1 && echo yes; exit 4", tty=True) == 4
        )
        assert client.out.data == b"yes\r\n"

    async def test_the_end_of_input_is_told(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient(stdin=True)
        client.keys.type(b"a line\nand a half")
        client.keys.end()
        assert await execute(bench, plan, client, "cat", tty=True) == 0
        assert client.out.data.count(b"and a half") == 2  # the echo, and what cat makes of it

    async def test_keys_are_signals(self, bench: Bench, plan: ContainerPlan) -> None:
        client = MemoryClient(stdin=True)
        running = execute(bench, plan, client, "sh", "-c", "echo begun; exec sleep 1000", tty=True)
        await client.out.shows(b"begun")
        client.keys.type(b"\x03")
        assert await running == 130

    async def test_devices_of_the_node_keep_their_owner(self, bench: Bench) -> None:
        plan = bench.plan(("sleep", "1000"))
        plan = dataclasses.replace(plan, process=dataclasses.replace(plan.process, user=User(1234, 1234, ())))
        await bench.create_and_start(plan)
        before = Path("/dev/null").stat()
        assert await execute(bench, plan, MemoryClient(), "true", tty=True) == 0
        after = Path("/dev/null").stat()
        assert (before.st_uid, before.st_mode) == (after.st_uid, after.st_mode)

    async def test_nothing_is_left(self, bench: Bench, plan: ContainerPlan) -> None:
        descriptors = len(os.listdir("/proc/self/fd"))
        for tty in (True, False):
            assert await execute(bench, plan, MemoryClient(), "true", tty=tty) == 0
            assert await execute(bench, plan, MemoryClient(), "/nowhere", tty=tty) == 127
        await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
        assert list((plan.bundle / "exec").iterdir()) == []


class TestAttach:
    async def test_every_client_gets_what_is_written_from_then_on(self, bench: Bench) -> None:
        script = "echo early; read -r go; echo late; echo err >&2; read -r go; exit 0"
        plan = with_input(bench, script)
        await bench.create_and_start(plan)
        await bench.is_ready(plan, "early")
        writer, reader = MemoryClient(stdin=True, stderr=True), MemoryClient(stderr=True)
        sessions = [join(bench, plan, client) for client in (writer, reader)]
        await asyncio.gather(writer.joined.wait(), reader.joined.wait())
        writer.keys.type(b"go\n")
        for client in (writer, reader):
            await client.out.shows(b"late\n")
            await client.err.shows(b"err\n")
            assert client.out.data == b"late\n"
        writer.keys.type(b"go\n")
        assert [await session for session in sessions] == [0, 0]
        assert (await bench.end_of(plan)).code == 0

    async def test_leaving_changes_nothing(self, bench: Bench) -> None:
        plan = with_input(bench, "echo ready; read -r line; echo got $line; read -r line; exit 3")
        await bench.create_and_start(plan)
        await bench.is_ready(plan)
        client = MemoryClient(stdin=True)
        session = join(bench, plan, client)
        client.keys.type(b"one\n")
        await client.out.shows(b"got one")
        client.keys.end()
        await asyncio.sleep(0.1)
        client.leave()
        assert await session == 0
        again = MemoryClient(stdin=True)
        session = join(bench, plan, again)
        again.keys.type(b"two\n")
        assert await session == 0
        assert (await bench.end_of(plan)).code == 3

    async def test_after_a_restart_of_the_daemon(self, bench: Bench) -> None:
        plan = with_input(bench, "echo ready; read -r line; echo got $line; sleep 0.2")
        await bench.create_and_start(plan)
        await bench.is_ready(plan)
        await bench.restart()
        await bench.handler.adopt(bench.record(plan, started_at=1), plan)
        client = MemoryClient(stdin=True)
        session = join(bench, plan, client)
        client.keys.type(b"it\n")
        assert await session == 0
        assert client.out.data == b"got it\n"

    async def test_stdin_once_ends_with_the_first_input(self, bench: Bench) -> None:
        plan = with_input(bench, "echo ready; cat; echo end; sleep 0.2", once=True)
        await bench.create_and_start(plan)
        await bench.is_ready(plan)
        onlooker = MemoryClient()
        looking = join(bench, plan, onlooker)
        await onlooker.joined.wait()
        onlooker.leave()  # it has no input, so that nothing of the container's ends with it
        await looking
        client = MemoryClient(stdin=True)
        session = join(bench, plan, client)
        client.keys.type(MEGABYTE[:100_000])
        client.keys.end()
        assert await session == 0
        assert digest(client.out.data) == digest(MEGABYTE[:100_000] + b"end\n")

    async def test_stdin_once_ends_when_the_client_vanishes(self, bench: Bench) -> None:
        plan = with_input(bench, "echo ready; cat; exit 6", once=True)
        await bench.create_and_start(plan)
        await bench.is_ready(plan)
        client = MemoryClient(stdin=True)
        session = join(bench, plan, client)
        client.keys.type(b"something\n")
        await client.out.shows(b"something")
        client.leave()
        await session
        assert (await bench.end_of(plan)).code == 6

    async def test_a_megabyte_each_way(self, bench: Bench) -> None:
        plan = with_input(bench, "echo ready; head -c 1048576", once=True)
        await bench.create_and_start(plan)
        await bench.is_ready(plan)
        client = MemoryClient(stdin=True)
        session = join(bench, plan, client)
        client.keys.type(MEGABYTE)
        assert await session == 0
        assert digest(client.out.data) == digest(MEGABYTE)

    async def test_the_window_of_a_terminal(self, bench: Bench) -> None:
        plan = with_input(
            bench, "trap 'stty size' WINCH; echo ready; while :; do read -r line && echo got $line; done", tty=True
        )
        await bench.create_and_start(plan)
        await bench.is_ready(plan)
        client = MemoryClient(stdin=True)
        session = join(bench, plan, client)
        client.window.put_nowait(TerminalSize(111, 33))
        await until(client.window.empty)
        await asyncio.sleep(0.1)
        client.keys.type(b"it\n")
        await client.out.shows(b"33 111")
        await client.out.shows(b"got it")
        client.leave()
        assert await session == 0
        assert plan.id not in bench.ends

    async def test_a_client_that_takes_nothing_is_sent_away(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(attach, "STALL_SECONDS", 0.3)
        plan = with_input(bench, "echo ready; read -r go; dd if=/dev/zero bs=1024k count=4; exit 5")
        await bench.create_and_start(plan)
        await bench.is_ready(plan)
        client = MemoryClient(stdin=True)
        session = join(bench, plan, client)
        client.out.room.clear()
        client.keys.type(b"go\n")
        with pytest.raises(FailedPrecondition, match="read nothing"):
            await session
        assert (await bench.end_of(plan)).code == 5

    async def test_a_container_that_does_not_run(self, bench: Bench) -> None:
        plan = await bench.run(bench.guest.exits(0))
        await bench.end_of(plan)
        with pytest.raises(FailedPrecondition, match="not running"):
            await join(bench, plan, MemoryClient())

    async def test_nothing_is_left(self, bench: Bench) -> None:
        plan = with_input(bench, "echo ready; cat", once=True)
        await bench.create_and_start(plan)
        await bench.is_ready(plan)
        descriptors = len(os.listdir("/proc/self/fd"))
        for stdin in (False, True):
            client = MemoryClient(stdin=stdin)
            session = join(bench, plan, client)
            await client.joined.wait()
            client.leave()
            await session
        await bench.end_of(plan)
        await until(lambda: len(os.listdir("/proc/self/fd")) < descriptors)  # the monitor's pidfd is gone as well
