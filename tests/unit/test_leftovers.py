"""The search for leftovers finds what a daemon left, and attributes nothing of others to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import leftovers


@contextmanager
def sleeper(**environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"], env={**os.environ, **environment}) as process:
        try:
            yield process
        finally:
            process.kill()


def pids(traces: leftovers.Traces) -> set[int]:
    return {int(line.split()[0]) for line in traces.processes}


def test_a_process_is_attributed_by_the_base_in_its_environment(tmp_path: Path) -> None:
    with sleeper(**{leftovers.DAEMON_VARIABLE: str(tmp_path / "1")}) as process:
        assert pids(leftovers.traces_of(tmp_path / "1", "")) == {process.pid}


def test_a_daemon_whose_base_only_begins_alike_is_somebody_else(tmp_path: Path) -> None:
    with sleeper(**{leftovers.DAEMON_VARIABLE: str(tmp_path / "10")}):
        assert not leftovers.traces_of(tmp_path / "1", "")


def test_a_shell_that_names_the_base_is_somebody_else(tmp_path: Path) -> None:
    with subprocess.Popen(["tail", "-f", f"{tmp_path}/daemon.log"], stderr=subprocess.DEVNULL) as process:
        found = leftovers.traces_of(tmp_path, "")
        process.kill()
    assert not found


def test_sweep_ends_what_is_attributed(tmp_path: Path) -> None:
    with sleeper(**{leftovers.DAEMON_VARIABLE: str(tmp_path)}) as process:
        leftovers.sweep(tmp_path, "")
        assert process.wait(5) == -9
    assert not leftovers.traces_of(tmp_path, "")


def test_what_a_run_left_is_found_by_comparing(tmp_path: Path) -> None:
    before = leftovers.machine()
    with sleeper(**{leftovers.RUN_VARIABLE: tmp_path.name}) as ours, sleeper(**{leftovers.RUN_VARIABLE: "another"}):
        left = leftovers.left_since(before, tmp_path.name)
    assert pids(left) == {ours.pid}
