"""Terminals of modules: of a container, which has a worker then, and of what is exec'ed; the client is in memory."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import signal
import struct
import termios
from typing import Any, Final

import pytest

from cri_shim.flows import attach
from cri_shim.flows import exec as further
from cri_shim.model.container import Reason
from cri_shim.model.handler import ContainerPlan
from cri_shim.model.streams import TerminalSize
from tests.contract.handler_suite import until
from tests.contract.test_wasm_exec import with_program
from tests.contract.wasm_bench import WasmBench
from tests.support import wasm
from tests.support.client import MemoryClient

pytestmark = pytest.mark.root

_SYS_PIDFD_GETFD: Final = 438


def with_terminal(bench: WasmBench, module: str, **config: Any) -> ContainerPlan:
    return bench.artifact(module, "app.wasm", tty=True, stdin=True, **config)


def join(bench: WasmBench, plan: ContainerPlan, client: MemoryClient) -> asyncio.Task[int]:
    async def session() -> int:
        async with asyncio.timeout(60):
            return await attach.serve(bench.handler, plan.id, client)

    return asyncio.ensure_future(session())


async def execute(bench: WasmBench, plan: ContainerPlan, client: MemoryClient, *args: str) -> int:
    async with asyncio.timeout(60):
        return await further.serve(further.Command(bench.handler, plan.id, args, tty=True), client)


def window(pid: object) -> tuple[int, int]:
    """Rows and columns of the terminal of a process: its own descriptor, as no device is opened by its mounts."""
    process = os.pidfd_open(int(str(pid)))
    fd = ctypes.CDLL(None).syscall(_SYS_PIDFD_GETFD, process, 0, 0)
    os.close(process)
    assert fd >= 0
    try:
        rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    finally:
        os.close(fd)
    return rows, columns


async def test_the_module_finds_a_terminal(bench: WasmBench) -> None:
    plan = with_terminal(bench, wasm.IS_TERMINAL)
    assert (await bench.finish(plan)).code == 0
    assert bench.entries(plan) == [("stdout", "F", "222")]
    assert bench.handler.info(plan.id)["placement"] == "process"


async def test_a_component_and_a_trap(bench: WasmBench) -> None:
    plan = with_terminal(bench, wasm.component("(call $say) (i32.const 0)"))
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == ["hello from a component"]
    plan = with_terminal(bench, wasm.TRAP)
    assert (await bench.finish(plan)).code == 134
    assert any("unreachable" in line for line in bench.text(plan))


async def test_attach(bench: WasmBench) -> None:
    plan = await bench.begin(with_terminal(bench, wasm.CAT))
    await bench.said(plan, "ready")
    client, onlooker = MemoryClient(stdin=True), MemoryClient()
    sessions = [join(bench, plan, client), join(bench, plan, onlooker)]
    await asyncio.gather(client.joined.wait(), onlooker.joined.wait())
    client.window.put_nowait(TerminalSize(100, 40))
    pid = bench.handler.info(plan.id)["pid"]
    await until(lambda: window(pid) == (40, 100))
    client.keys.type(b"it\n")
    for seen in (client, onlooker):
        await seen.out.shows(b"it\r\nit\r\n")  # echoed, and copied
    client.leave()
    await sessions[0]
    assert plan.id not in bench.ends
    client = MemoryClient(stdin=True)
    sessions.append(join(bench, plan, client))
    client.keys.type(b"\x04")
    assert await asyncio.gather(*sessions[1:]) == [0, 0]
    assert (await bench.end_of(plan)).code == 0
    assert bench.text(plan) == ["ready", "it", "it", "ready"]


@pytest.mark.parametrize(("module", "key", "code"), [(wasm.SLEEP, b"\x03", 130), (wasm.SPIN, b"\x1c", 131)])
async def test_its_keys_end_it(bench: WasmBench, module: str, key: bytes, code: int) -> None:
    plan = await bench.begin(with_terminal(bench, module))
    client = MemoryClient(stdin=True)
    session = join(bench, plan, client)
    client.keys.type(b"\x1a" + key)  # Ctrl-Z means nothing: nobody would let it go on
    assert await session == 0
    ended = await bench.end_of(plan)
    assert (ended.code, ended.reason) == (code, Reason.ERROR)


async def test_a_key_ends_one_that_reads(bench: WasmBench) -> None:
    plan = await bench.begin(with_terminal(bench, wasm.CAT))
    await bench.said(plan, "ready")
    client = MemoryClient(stdin=True)
    session = join(bench, plan, client)
    client.keys.type(b"\x03")
    assert await session == 0
    assert (await bench.end_of(plan)).code == 130


async def test_a_graceful_stop_is_the_end_of_its_input(bench: WasmBench) -> None:
    plan = await bench.begin(with_terminal(bench, wasm.CAT, annotations={"cri-shim.io/stop": "graceful"}))
    await bench.said(plan, "ready")
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 0
    assert bench.text(plan) == ["ready", "ready"]


async def test_its_log_is_rotated(bench: WasmBench) -> None:
    plan = await bench.begin(with_terminal(bench, wasm.CAT))
    await bench.said(plan, "ready")
    assert plan.log_path is not None
    old = plan.log_path.rename(plan.log_path.with_suffix(".old"))
    await bench.handler.reopen_log(plan.id)
    client = MemoryClient(stdin=True)
    session = join(bench, plan, client)
    client.keys.type(b"new\n\x04")
    assert await session == 0
    await bench.end_of(plan)
    assert bench.text(plan) == ["new", "new", "ready"]
    assert old.read_text().count("\n") == 1


async def test_stdin_once(bench: WasmBench) -> None:
    plan = await bench.begin(with_terminal(bench, wasm.CAT, stdin_once=True))
    await bench.said(plan, "ready")
    client = MemoryClient(stdin=True)
    session = join(bench, plan, client)
    client.keys.type(b"last\n")
    client.keys.end()
    assert await session == 0
    assert (await bench.end_of(plan)).code == 0


async def test_it_goes_on_with_the_next_daemon(bench: WasmBench) -> None:
    plan = await bench.begin(with_terminal(bench, wasm.CAT))
    await bench.said(plan, "ready")
    await bench.restart()
    assert await bench.handler.adopt(bench.record(plan, started_at=5), plan) is None
    client = MemoryClient(stdin=True)
    session = join(bench, plan, client)
    client.keys.type(b"again\n\x04")
    assert await session == 0
    assert (await bench.end_of(plan)).code == 0
    assert "again" in bench.text(plan)


async def test_exec(bench: WasmBench) -> None:
    plan = bench.plan(bench.programs.waits())
    with_program(plan, "kinds", wasm.IS_TERMINAL)
    with_program(plan, "copy", wasm.CAT)
    with_program(plan, "spin", wasm.SPIN)
    plan = await bench.begin(plan)
    client = MemoryClient(stdin=True)
    assert await execute(bench, plan, client, "kinds") == 0
    assert client.out.data == b"222\r\n"
    client = MemoryClient(stdin=True)
    client.keys.type(b"typed\n")
    client.keys.end()
    assert await execute(bench, plan, client, "copy") == 0
    assert client.out.data.count(b"typed\r\n") == 2  # echoed, and copied
    client = MemoryClient(stdin=True)
    client.keys.type(b"\x03")
    assert await execute(bench, plan, client, "spin") == 130


async def test_exec_of_applets(bench: WasmBench) -> None:
    plan = await bench.begin(bench.artifact(wasm.SLEEP, "app.wasm", env=("NAME=value",)))
    client = MemoryClient(stdin=True)
    assert await execute(bench, plan, client, "env") == 0
    assert client.out.data == b"NAME=value\r\nTERM=xterm\r\n"
    client = MemoryClient(stdin=True)
    running = asyncio.ensure_future(execute(bench, plan, client, "cat"))
    client.keys.type(b"word\n")
    await client.out.shows(b"word\r\nword\r\n")
    client.keys.type(b"\x03")
    assert await running == 130
    client = MemoryClient()
    assert await execute(bench, plan, client, "sh") == 127
    assert b"there is no program 'sh'" in client.out.data
