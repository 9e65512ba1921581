"""What is neither a file nor a directory, in a volume or from an image: a guest can open none that holds it up, and no
device, in the daemon and in a process of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cri_shim.kernel import mounts
from cri_shim.pb import api_pb2 as pb
from handlers.wasmtime.errnos import Errno
from tests.contract.wasm_bench import WasmBench, mount
from tests.support import wasm

pytestmark = pytest.mark.root

ZERO = os.makedev(1, 5)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    made = tmp_path / "volume"
    made.mkdir()
    return made


@pytest.fixture
def below(volume: Path) -> Iterator[Path]:
    """Another file system in the volume."""
    made = volume / "below"
    made.mkdir()
    mounts.tmpfs(made, size=1 << 20, mode=0o755)
    yield made
    mounts.unmount(made)


def zero(place: Path) -> None:
    os.mknod(place, stat.S_IFCHR | 0o666, ZERO)
    place.chmod(0o666)


async def test_no_device_of_a_volume_is_opened(bench: WasmBench, volume: Path, below: Path) -> None:
    """Who else has the volume may have made it, in a container that may not open it either."""
    zero(volume / "zero")
    zero(below / "zero")
    os.mknod(volume / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 0))
    (volume / "link").symlink_to("zero")
    for guest in (
        *(wasm.prints_file(3, name) for name in ("zero", "link", "below/zero", "disk")),
        wasm.writes_file(3, "zero", "x"),
    ):
        plan = bench.artifact(guest, mounts=[mount(volume, "/data")])
        assert (await bench.finish(plan)).code == Errno.ACCES
        assert bench.entries(plan) == []


@pytest.mark.parametrize("mounted", [False, True])
async def test_no_device_of_an_image_is_opened(bench: WasmBench, tmp_path: Path, mounted: bool) -> None:
    rootfs = tmp_path / "rootfs"
    rootfs.mkdir()
    zero(rootfs / "zero")
    (rootfs / "app.wasm").write_bytes(wasm.assemble(wasm.prints_file(3, "zero")))
    (tmp_path / "log").touch()
    log = [mount(tmp_path / "log", "/log")] if mounted else []
    plan = bench.artifact(wasm.HELLO, mounts=log)
    assert plan.image is not None
    image, process = msgspec.structs.replace(plan.image, wasm=None), replace(plan.process, args=("/app.wasm",))
    assert (await bench.finish(replace(plan, image=image, process=process, rootfs=rootfs))).code == Errno.ACCES


async def test_who_opens_a_fifo_or_a_socket_is_held_up_by_nobody(
    bench: WasmBench, in_process: bool, volume: Path
) -> None:
    """In the daemon neither is opened; a process of its own waits for the other end, and ends when it is told to."""
    os.mkfifo(volume / "fifo")
    (volume / "link").symlink_to("fifo")
    mounted = [mount(volume, "/data")]
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(volume / "socket"))
        ended = await bench.finish(bench.artifact(wasm.prints_file(3, "socket"), mounts=mounted))
        assert ended.code == (Errno.NXIO if in_process else Errno.IO)  # as the engine has it
    for guest in (wasm.prints_file(3, "fifo"), wasm.prints_file(3, "link"), wasm.writes_file(3, "fifo", "x")):
        plan = await bench.begin(bench.artifact(guest, mounts=mounted))
        if not in_process:
            await bench.handler.kill(plan.id, signal.SIGTERM)
        assert (await bench.end_of(plan)).code == (Errno.NXIO if in_process else 143)


async def test_a_look_at_a_file_leaves_no_trace_in_the_guest(bench: WasmBench, volume: Path) -> None:
    """Where the engine answers, the guest has what it had."""
    (volume / "file").write_text("content")
    begin = "".join(f"{number:03}\\0a" for number in range(25))
    guest = f"""(module
      (import "wasi_snapshot_preview1" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (data (i32.const 0) "{begin}") (data (i32.const 1024) "file")
      (data (i32.const 2052) "\\64\\00\\00\\00")
      (func (export "_start")
        (call $exit (i32.or
          (call $open (i32.const 3) (i32.const 1) (i32.const 1024) (i32.const 4) (i32.const 0)
            (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 3000))
          (call $write (i32.const 1) (i32.const 2048) (i32.const 1) (i32.const 3004))))))"""
    plan = bench.artifact(guest, mounts=[mount(volume, "/data")])
    assert (await bench.finish(plan)).code == 0
    assert bench.text(plan) == [f"{number:03}" for number in range(25)]


async def test_what_is_mounted_later_is_seen_where_it_was_asked_for(bench: WasmBench, volume: Path) -> None:
    """By a process of its own."""
    mounts.make_shared(volume)
    later = volume / "later"
    later.mkdir()
    asked = mount(volume, "/data")
    asked.propagation = pb.MountPropagation.PROPAGATION_HOST_TO_CONTAINER
    try:
        plan = await bench.begin(bench.artifact(wasm.SLEEP, mounts=[asked]))
        mounts.tmpfs(later, size=1 << 20, mode=0o755)
        (later / "file").touch()
        opened = Path(f"/proc/{bench.handler.info(plan.id)['pid']}/fd").iterdir()
        assert any((fd / "later" / "file").exists() for fd in opened)
    finally:
        mounts.unmount(later)
        mounts.unmount(volume)


async def test_nothing_is_mounted_for_it(bench: WasmBench, volume: Path) -> None:
    """That anybody else would see."""
    before = len(mounts.mountinfo())
    kind = "(func (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32))"
    opens = f'(module (import "wasi_snapshot_preview1" "path_open" {kind})'
    plan = await bench.begin(bench.artifact(wasm.SLEEP.replace("(module", opens, 1), mounts=[mount(volume, "/data")]))
    assert len(mounts.mountinfo()) == before
    await bench.handler.kill(plan.id, signal.SIGTERM)
    assert (await bench.end_of(plan)).code == 143
