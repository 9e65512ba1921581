"""Logs that take nothing, of guests in the daemon and in processes of their own: a disk, or a FIFO, that hangs.

Not the thread that writes them (`tests/unit/test_log_hangs.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cri_shim.model.errors import DeadlineExceeded
from tests.contract.handler_suite import until
from tests.contract.wasm_bench import WasmBench, descriptors
from tests.support import wasm

pytestmark = pytest.mark.root


class Disk:
    """A file system that can be made to hang, and to go on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def freeze(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", str(self.path)], check=True)

    def thaw(self) -> None:
        subprocess.run(["fsfreeze", "--unfreeze", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    image, place = tmp_path / "image", tmp_path / "disk"
    image.touch()
    os.truncate(image, 16 << 20)
    place.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs mkfs.ext4 (apt-get install e2fsprogs) and loop devices: {error}")
    made = Disk(place)
    yield made
    with contextlib.suppress(subprocess.CalledProcessError):  # if the test did not come to that
        made.thaw()
    subprocess.run(["umount", "--lazy", str(place)], check=True)


async def test_a_disk_that_hangs_holds_up_only_whose_logs_are_there(bench: WasmBench, disk: Disk) -> None:
    """Their guests wait as for a full pipe, and end when they are told to."""
    fast = replace(bench.artifact(wasm.counts(1 << 30)), log_path=disk.path / "fast")
    slow = replace(bench.artifact(wasm.PROGRAMS["count"]), log_path=disk.path / "slow")
    for plan in (fast, slow):
        await bench.begin(plan)
    await bench.said(slow, " 1\n")
    disk.freeze()
    other = await bench.begin(bench.artifact(wasm.PROGRAMS["count"]))
    await bench.said(other, " 20\n")  # each 20 ms
    for plan in (fast, slow):
        await bench.handler.kill(plan.id, signal.SIGTERM)
        assert (await bench.end_of(plan)).code == 143
    assert other.id not in bench.ends
    await bench.said(other, " 60\n")
    disk.thaw()
    await bench.handler.kill(other.id, signal.SIGTERM)
    assert (await bench.end_of(other)).code == 143
    for plan in (fast, slow, other):
        lines = [text for _, tag, text in bench.entries(plan) if tag == "F"]
        assert [int(line) for line in lines] == list(range(int(lines[0]), int(lines[0]) + len(lines)))


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    made = tmp_path / "fifo"
    os.mkfifo(made)
    return made


async def test_a_log_that_takes_nothing_keeps_nobody_from_ending(
    bench: WasmBench, fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor from saying how it has ended by itself; no other file is waited for for ever."""
    monkeypatch.setattr("handlers.wasmtime.handler._LOG_SECONDS", 0.2)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    endless = await bench.begin(replace(bench.artifact(wasm.counts(1 << 30)), log_path=fifo))
    finite = await bench.begin(replace(bench.artifact(wasm.counts(1500)), log_path=fifo))
    killed = await bench.begin(replace(bench.artifact(wasm.counts(1 << 30)), log_path=fifo))
    with pytest.raises(DeadlineExceeded, match=f"the log {fifo} cannot be opened anew"):
        await bench.handler.reopen_log(endless.id)
    assert bench.ends == {}
    for plan, number, code in (
        (endless, signal.SIGTERM, 143),
        (finite, signal.SIGTERM, 0),
        (killed, signal.SIGKILL, 137),
    ):
        await bench.handler.kill(plan.id, number)
        assert (await bench.end_of(plan)).code == code
    os.close(reader)


async def test_a_log_that_is_not_opened_fails_its_start_and_nothing_else(
    bench: WasmBench, fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers.wasmtime.in_process.OPENING_SECONDS", 1.0)  # a worker has its own
    await bench.finish(bench.artifact(wasm.HELLO))
    before = descriptors()
    plan = replace(bench.artifact(wasm.PROGRAMS["count"]), log_path=fifo)
    await bench.handler.create(plan)
    start = asyncio.ensure_future(bench.handler.start(plan.id))
    other = await bench.finish(bench.artifact(wasm.HELLO))
    assert other.code == 0
    with pytest.raises(DeadlineExceeded, match=f"log {fifo} cannot be opened: the file system does not answer"):
        await start
    await bench.handler.delete(plan.id, bench.cgroup_parent)
    os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))  # what waits for it gets it
    await until(lambda: f"wasm-{plan.id[:10]}" not in names_of_threads())
    await until(lambda: descriptors() <= before)
    assert plan.id not in bench.ends


def names_of_threads() -> set[str]:
    """Of this process."""
    names = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            names.add((task / "comm").read_text().strip())
    return names
