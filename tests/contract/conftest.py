"""Fixtures of the contract tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.contract.wasm_bench import WasmBench, worker_bench
from tests.support import leftovers
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.puller import Node


@pytest.fixture(scope="session")
def module_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `root` for all benches of the run, so that each module is compiled once."""
    return tmp_path_factory.mktemp("root")


@pytest_asyncio.fixture(params=["in-process", "process"])
async def bench(
    request: pytest.FixtureRequest, module_root: Path, tmp_path: Path, run_name: str
) -> AsyncIterator[WasmBench]:
    """The wasmtime handler in each placement; a file whose tests want another bench has its own."""
    parent = f"/{leftovers.CGROUP_PREFIX}{run_name}/placements"
    async with worker_bench(module_root, tmp_path / "state", parent, isolation=request.param) as made:
        yield made


@pytest.fixture
def in_process(bench: WasmBench) -> bool:
    """Which placement `bench` is of."""
    return not bench.programs.outlives_daemon


@pytest.fixture
def registry() -> Iterator[LoopbackRegistry]:
    """A registry of this process, whose faults a test can choose."""
    with LoopbackRegistry() as started:
        yield started


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """The image side of a daemon on an empty directory."""
    made = Node(tmp_path)
    await made.open()
    yield made
    await made.close()
