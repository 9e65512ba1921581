"""Exec into a Wasm container: another instance of a module of its image, in a process of its own, as its user.

Wherever the container itself runs.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from cri_shim.model.container import User
from cri_shim.model.errors import CannotExecute, CriShimError, FailedPrecondition
from cri_shim.model.handler import ContainerPlan, ExecRequest
from tests.contract.wasm_bench import WasmBench, limited, mount
from tests.support import wasm

pytestmark = pytest.mark.root


async def execute(
    bench: WasmBench, plan: ContainerPlan, *args: str, stdin: bytes | None = None
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    read, write = zip(*(os.pipe() for _ in range(3)), strict=True)
    try:
        if stdin is not None:
            os.write(write[0], stdin)
        os.close(write[0])
        session = await bench.handler.exec(
            plan.id, ExecRequest(args, read[0] if stdin is not None else None, *write[1:])
        )
    finally:
        for fd in write[1:]:
            os.close(fd)
    code = await session.wait()
    out, err = (os.read(fd, 1 << 16).decode() for fd in read[1:])
    for fd in read:
        os.close(fd)
    return code, out, err


async def test_the_programs_of_an_image(bench: WasmBench) -> None:
    plan = await bench.run(bench.programs.waits(), ("NAME=value",))
    await bench.is_ready(plan)
    assert await execute(bench, plan, *bench.programs.exits(9)) == (9, "", "")
    assert await execute(bench, plan, *bench.programs.says("to out", "to err")) == (0, "to out\n", "to err\n")
    code, out, _ = await execute(bench, plan, *bench.programs.reveals("two words"))
    assert code == 0
    assert {"arg two words", "env NAME=value"} <= set(out.splitlines())
    assert plan.id not in bench.ends
    for program, status in (("nowhere", 127), ("/bin/broken", 126)):
        with pytest.raises(CannotExecute) as refused:
            await execute(bench, plan, program)
        assert refused.value.exit_status == status


async def test_the_module_of_an_artifact_once_more(bench: WasmBench) -> None:
    plan = await bench.begin(bench.artifact(wasm.SLEEP, "app.wasm"))
    await bench.said(plan, "going to sleep")
    read, write = os.pipe()
    session = await bench.handler.exec(plan.id, ExecRequest(("app.wasm",), None, write, write))
    os.close(write)
    assert await asyncio.to_thread(os.read, read, 100) == b"going to sleep\n"
    assert len(bench.cgroups.processes(bench.cgroup_parent, plan.id)) >= 1
    await session.kill()
    assert await session.wait() == 137
    os.close(read)
    # In the log is what the container itself has said.
    assert bench.text(plan) == ["going to sleep"]


@pytest.mark.parametrize("from_image", [True, False])
async def test_a_module_of_an_image_volume(bench: WasmBench, tmp_path: Path, from_image: bool) -> None:
    """Of a volume of the node none: its file may be one that the container's user cannot read."""
    (tmp_path / "tool").write_bytes(wasm.assemble(wasm.HELLO))
    volume = mount(tmp_path, "/tools", readonly=True)
    if from_image:
        volume.image.image = "tools"
    plan = await bench.begin(bench.artifact(wasm.SLEEP, "app.wasm", mounts=[volume]))
    if from_image:
        assert await execute(bench, plan, "/tools/tool") == (0, "hello from wasm\n", "")
    else:
        with pytest.raises(CannotExecute, match="there is no program '/tools/tool'"):
            await execute(bench, plan, "/tools/tool")


def with_program(plan: ContainerPlan, name: str, text: str) -> ContainerPlan:
    """One more module in the root file system of a container."""
    assert plan.rootfs is not None
    (plan.rootfs / "bin" / name).write_bytes(wasm.assemble(text))
    return plan


async def test_input_goes_to_it(bench: WasmBench) -> None:
    plan = await bench.begin(with_program(bench.plan(bench.programs.waits()), "cat", wasm.CAT))
    assert await execute(bench, plan, "cat", stdin=b"from the client") == (0, "ready\nfrom the client", "ready\n")
    assert await execute(bench, plan, "cat") == (0, "ready\n", "ready\n")


@pytest.mark.parametrize(("uid", "secret"), [(0, "of root\n"), (1234, "")])
async def test_it_has_the_containers_files_and_identity(
    bench: WasmBench, tmp_path: Path, uid: int, secret: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o755)
    for name, text, mode in (("secret", "of root\n", 0o600), ("open", "for all\n", 0o644)):
        (data / name).write_text(text)
        (data / name).chmod(mode)
    plan = bench.plan(bench.programs.waits())
    plan.config.mounts.append(mount(data, "/data", readonly=True))
    for name in ("secret", "open"):
        with_program(plan, name, wasm.prints_file(3, name))
    plan = await bench.begin(replace(plan, process=replace(plan.process, user=User(uid=uid, gid=uid))))
    assert (await execute(bench, plan, "open"))[1] == "for all\n"
    assert (await execute(bench, plan, "secret"))[1] == secret


async def test_a_word_that_can_name_nothing(bench: WasmBench) -> None:
    plan = await bench.begin(bench.plan(bench.programs.waits()))
    assert plan.rootfs is not None
    (plan.rootfs / "circle").symlink_to("circle")
    for word in ("/circle", "x" * 256):
        with pytest.raises(CannotExecute, match="is not in the image") as caught:
            await execute(bench, plan, word)
        assert caught.value.exit_status == 127


async def test_not_into_one_that_does_not_run(bench: WasmBench) -> None:
    plan = await bench.run(bench.programs.exits(0))
    await bench.end_of(plan)
    with pytest.raises(FailedPrecondition, match="not running"):
        await execute(bench, plan, *bench.programs.exits(0))


async def test_it_ends_with_the_container(bench: WasmBench) -> None:
    plan = await bench.begin(bench.artifact(wasm.SLEEP, "app.wasm", linux=limited(32 << 20)))
    await bench.said(plan, "going to sleep")
    session = await bench.handler.exec(plan.id, ExecRequest(("app.wasm",), None, 1, 2))
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert await session.wait() == 137
    await bench.end_of(plan)
    await bench.handler.delete(plan.id, bench.cgroup_parent)
    assert bench.cgroups.processes(bench.cgroup_parent, plan.id) == []


async def test_what_cannot_be_is_refused(bench: WasmBench) -> None:
    plan = await bench.begin(bench.artifact(wasm.SLEEP, "app.wasm"))
    code, _, err = await execute(bench, plan, "app.wasm#nothing")
    assert (code, "exports no function 'nothing'" in err) == (126, True)
    with pytest.raises(CriShimError):
        await bench.handler.exec(bench.plan(("x",)).id, ExecRequest(("x",), None, 1, 2))
