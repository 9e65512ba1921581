"""The applets that every Wasm container has for exec: what its module sees, as its user, wherever that runs."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from cri_shim.model.container import User
from cri_shim.model.errors import CannotExecute
from cri_shim.model.handler import ContainerPlan, ExecRequest
from tests.contract.handler_suite import until
from tests.contract.test_wasm_exec import execute, with_program
from tests.contract.wasm_bench import WasmBench, limited, mount
from tests.support import wasm

pytestmark = pytest.mark.root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A volume with a file for all, one for root, a link beneath it and one that leads out."""
    tmp_path.chmod(0o755)
    directory = tmp_path / "data"
    (directory / "sub").mkdir(parents=True)
    (directory / "open").write_text("for all\n")
    (directory / "secret").write_text("of root\n")
    (directory / "secret").chmod(0o600)
    (directory / ".hidden").touch()
    (directory / "sub" / "deep").touch()
    (directory / "link").symlink_to("open")
    (directory / "out").symlink_to("../outside")
    (tmp_path / "outside").write_text("of the node\n")
    return directory


async def mounted(bench: WasmBench, data: Path, *, uid: int = 0, readonly: bool = False) -> ContainerPlan:
    """A container of an artifact with the volume at /vol/data."""
    plan = bench.artifact(
        wasm.SLEEP, "app.wasm", env=("NAME=value",), mounts=[mount(data, "/vol/data", readonly=readonly)]
    )
    plan = await bench.begin(replace(plan, process=replace(plan.process, user=User(uid=uid, gid=uid, groups=(7,)))))
    await bench.said(plan, "going to sleep")
    return plan


async def test_ls(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data)
    assert await execute(bench, plan, "ls", "/vol/data") == (0, "link\nopen\nout\nsecret\nsub\n", "")
    assert (await execute(bench, plan, "ls", "-A", "/vol/data/"))[1].splitlines()[0] == ".hidden"
    # What is only on the way to a preopen is seen too.
    assert await execute(bench, plan, "/bin/ls", "/") == (0, "etc\nvol\n", "")
    assert await execute(bench, plan, "ls", "-d", "/vol", "/vol/data/open") == (0, "/vol\n/vol/data/open\n", "")
    code, out, _ = await execute(bench, plan, "ls", "-l", "vol/data")
    lines = out.splitlines()
    assert (code, lines[0].split()[0]) == (0, "total")
    assert lines[1].endswith(" link -> open")
    found = next(line for line in lines if line.endswith(" secret")).split()
    assert (found[0], found[1:5]) == ("-rw-------", ["1", "0", "0", "8"])
    code, out, _ = await execute(bench, plan, "ls", "-R", "/vol/data")
    assert "\n/vol/data/sub:\ndeep\n" in out
    code, out, err = await execute(bench, plan, "ls", "/nowhere", "/vol")
    assert (code, out, err) == (2, "/vol:\ndata\n", "ls: cannot access '/nowhere': No such file or directory\n")
    assert (await execute(bench, plan, "ls", "-Z"))[::2] == (2, "ls: invalid option -- 'Z'\n")


async def test_cat(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data)
    assert await execute(bench, plan, "cat", "/vol/data/open", "/vol/data/link") == (0, "for all\nfor all\n", "")
    assert await execute(bench, plan, "cat", stdin=b"input") == (0, "input", "")
    assert await execute(bench, plan, "cat", "/vol/data/open", "-", stdin=b"input") == (0, "for all\ninput", "")
    for name, text in (
        ("/vol/data/out", "A symbolic link leads out of the preopened directory"),
        ("/vol/data/../../etc/passwd", "No such file or directory"),
        ("/etc/passwd", "No such file or directory"),
        ("/vol/data/sub", "Is a directory"),
    ):
        assert await execute(bench, plan, "cat", name) == (1, "", f"cat: {name}: {text}\n")


async def test_it_has_the_users_rights(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data, uid=1234)
    assert await execute(bench, plan, "cat", "/vol/data/secret") == (
        1,
        "",
        "cat: /vol/data/secret: Permission denied\n",
    )
    assert await execute(bench, plan, "id") == (0, "uid=1234 gid=1234 groups=1234,7\n", "")
    data.chmod(0o700)
    assert (await execute(bench, plan, "ls", "/vol/data"))[0] == 2


async def test_an_image(bench: WasmBench, data: Path) -> None:
    plan = bench.plan(bench.programs.waits())
    assert plan.rootfs is not None
    (plan.rootfs / "file").write_text("of the image\n")
    (plan.rootfs / "etc").mkdir()
    (plan.rootfs / "etc/passwd").write_text("# people\nann:x:0:0::/:\n")
    # A program that is none for Wasm does not stand in the way of an applet, a module does.
    (plan.rootfs / "bin" / "ls").write_bytes(b"\x7fELF")
    with_program(plan, "env", wasm.HELLO)
    plan.config.mounts.append(mount(data, "/made/up"))
    plan = await bench.begin(replace(plan, process=replace(plan.process, env=("PATH=/bin", "PWD=/bin"), cwd="/bin")))
    assert (await execute(bench, plan, "ls", "/"))[1] == "bin\netc\nfile\nmade\n"
    assert (await execute(bench, plan, "pwd"))[1] == "/bin\n"
    assert (await execute(bench, plan, "cat", "../file"))[1] == "of the image\n"
    assert (await execute(bench, plan, "ls", "../made/up/sub"))[1] == "deep\n"
    assert [(await execute(bench, plan, "id", options))[1] for options in ("-un", "-gn", "-u")] == [
        "ann\n",
        "0\n",
        "0\n",
    ]
    assert (await execute(bench, plan, "env"))[1] == "hello from wasm\n"
    assert "PATH=/bin\n" in (await execute(bench, plan, "printenv"))[1]


async def test_what_the_container_is(bench: WasmBench, data: Path) -> None:
    plan = bench.artifact(
        wasm.SLEEP, "app.wasm", "word", env=("NAME=value",), mounts=[mount(data, "/data", readonly=True)],
        linux=limited(32 << 20),
    )  # fmt: skip
    plan = await bench.begin(plan)
    await bench.said(plan, "going to sleep")
    assert await execute(bench, plan, "env") == (0, "NAME=value\n", "")
    assert await execute(bench, plan, "printenv", "NAME", "OTHER") == (1, "value\n", "")
    code, out, _ = await execute(bench, plan, "stat")
    assert code == 0
    placed = f"   Placement: {bench.handler.info(plan.id)['placement']}: the handler's option isolation"
    assert {placed, "Memory limit: 33554432 bytes", "     Preopen: /data, read-only"} <= set(out.splitlines())
    session = await bench.handler.exec(plan.id, ExecRequest(("sleep", "1h"), None, 1, 2))
    code, out, _ = await execute(bench, plan, "ps", "aux")
    rows = [line.split() for line in out.splitlines()]
    assert [(row[0], " ".join(row[4:])) for row in rows] == [
        ("PID", "COMMAND"),
        ("1", "app.wasm word"),
        (rows[2][0], "sleep 1h"),
        (rows[3][0], "ps aux"),
    ]
    assert int(rows[1][3]) > 0
    await session.kill()
    assert await session.wait() == 137
    assert "sleep" not in (await execute(bench, plan, "ps"))[1]


async def test_stat_and_df_and_test(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data, readonly=True)
    at = "/vol/data"
    code, out, _ = await execute(bench, plan, "stat", f"{at}/open")
    assert code == 0
    assert " Mount: /vol/data, read-only" in out.splitlines()
    assert await execute(bench, plan, "stat", "-c", "%n %s %a %F", f"{at}/secret", f"{at}/sub") == (
        0,
        f"{at}/secret 8 600 regular file\n{at}/sub {(data / 'sub').stat().st_size} 755 directory\n",
        "",
    )
    assert (await execute(bench, plan, "stat", "/x"))[::2] == (
        1, "stat: cannot stat '/x': No such file or directory\n",
    )  # fmt: skip
    code, out, _ = await execute(bench, plan, "df", "-h")
    assert (code, out.splitlines()[1].split()[-1]) == (0, at)
    for words, status in (("-f open", 0), ("-d open", 1), ("-s .hidden", 1), ("-e nothing", 1), ("-L link", 0)):
        operator, name = words.split()
        assert (await execute(bench, plan, "test", operator, f"{at}/{name}"))[0] == status
    assert (await execute(bench, plan, "test", "!", "-e", "/nothing"))[0] == 0
    assert (await execute(bench, plan, "test", "1"))[0] == 2


async def test_the_trivial_ones(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data)
    assert await execute(bench, plan, "true") == (0, "", "")
    assert await execute(bench, plan, "false") == (1, "", "")
    assert await execute(bench, plan, "echo", "two", "words") == (0, "two words\n", "")
    assert await execute(bench, plan, "echo", "-n", "x") == (0, "x", "")
    assert (await execute(bench, plan, "sleep", "0"))[0] == 0
    assert await execute(bench, plan, "sleep", "x") == (1, "", "sleep: invalid time interval 'x'\n")
    assert (await execute(bench, plan, "env", "app"))[0] == 127


async def test_anything_else_is_told_what_there_is(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data)
    with pytest.raises(CannotExecute, match=r"no program 'sh'.*'app\.wasm'.*besides, there are cat, df") as refused:
        await execute(bench, plan, "sh")
    assert refused.value.exit_status == 127
    with pytest.raises(CannotExecute):
        await execute(bench, plan, "/opt/ls")


async def test_who_reads_no_more_ends_it(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data)
    (data / "big").write_bytes(bytes(1 << 20))
    read, write = os.pipe()
    session = await bench.handler.exec(plan.id, ExecRequest(("cat", "/vol/data/big"), None, write, 2))
    os.close(write)
    assert await asyncio.to_thread(os.read, read, 1)
    os.close(read)
    assert await session.wait() == 128 + signal.SIGPIPE


async def test_it_is_in_the_containers_cgroup_and_has_a_limit(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data)
    session = await bench.handler.exec(plan.id, ExecRequest(("sleep", "1h"), None, 1, 2))
    is_worker = bench.handler.info(plan.id)["placement"] == "process"
    pids = bench.cgroups.processes(bench.cgroup_parent, plan.id)
    assert len(pids) == 1 + is_worker
    await until(lambda: any("Max data size             268435456" in limits_of(pid) for pid in pids))
    await session.kill()
    assert await session.wait() == 137


def limits_of(pid: int) -> str:
    return Path(f"/proc/{pid}/limits").read_text()


def packed(*members: tuple[str, bytes | None]) -> bytes:
    """An archive of files, and of directories, whose content is None."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.mode, member.size = 0o755 if content is None else 0o640, len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))
    return stream.getvalue()


async def test_tar_takes_files_out(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data)
    read, write = os.pipe()
    session = await bench.handler.exec(plan.id, ExecRequest(("tar", "cf", "-", "/vol/data"), None, write, 2))
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        content = await asyncio.to_thread(stream.read)
    assert await session.wait() == 0
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert archive.getnames() == [
            "vol/data",
            *(f"vol/data/{name}" for name in (".hidden", "link", "open", "out", "secret", "sub", "sub/deep")),
        ]
        found = archive.extractfile("vol/data/open")
        assert found is not None
        assert found.read() == b"for all\n"
        assert archive.getmember("vol/data/link").linkname == "open"
        assert archive.getmember("vol/data/secret").mode == 0o600
    assert (await execute(bench, plan, "tar", "cf", "-", "/nowhere"))[0] == 2


async def test_tar_puts_files_in(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data)
    content = packed(("top", None), ("top/file", b"copied\n"), ("open", b"new\n"))
    assert await execute(bench, plan, "tar", "-xmf", "-", "-C", "/vol/data", stdin=content) == (0, "", "")
    assert [(data / name).read_text() for name in ("top/file", "open")] == ["copied\n", "new\n"]
    assert (data / "top" / "file").stat().st_mode & 0o777 == 0o640
    (data / "away").symlink_to("/")
    for name, words in (
        ("../escaped", "contains '..'"),
        ("out", "cannot open"),  # a link that leads out is not followed
        ("away/escaped", "leads out of the preopened directory"),
    ):
        code, _, err = await execute(bench, plan, "tar", "-xf", "-", "-C", "/vol/data", stdin=packed((name, b"x")))
        assert (code, words in err) == (2, True)
    assert (data.parent / "outside").read_text() == "of the node\n"
    assert (await execute(bench, plan, "tar", "-xf", "-", stdin=b"no archive"))[0] == 2
    assert (await execute(bench, plan, "tar", "-xzf", "-"))[0] == 2


async def test_tar_respects_mounts_and_rights(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data, readonly=True)
    code, _, err = await execute(bench, plan, "tar", "-xf", "-", "-C", "/vol/data", stdin=packed(("new", b"x")))
    assert (code, err) == (2, "tar: new: cannot open: Read-only file system\n")
    plan = await mounted(bench, data, uid=1234)
    code, _, err = await execute(bench, plan, "tar", "-xf", "-", "-C", "/vol/data", stdin=packed(("new", b"x")))
    assert (code, err) == (2, "tar: new: cannot open: Permission denied\n")
    assert not (data / "new").exists()


async def test_deep_trees_are_walked(bench: WasmBench, data: Path) -> None:
    plan = await mounted(bench, data)
    directory = os.open(data, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=directory)
        inner = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = inner
    os.close(directory)
    read, write = os.pipe()
    session = await bench.handler.exec(plan.id, ExecRequest(("ls", "-R", "/vol/data"), None, write, 2))
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = await asyncio.to_thread(stream.read)
    assert await session.wait() == 0
    assert said.count(b"\nd\n") >= 1500
