"""The clients, built once for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Lab, shared_lab
from tests.support import interop
from tests.support.interop import Interop

__all__ = ["shared_lab"]


@pytest.fixture(scope="session")
def interop_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if interop.go() is None:
        pytest.skip("no Go on this machine, which the clients of Kubernetes are built with: https://go.dev/dl")
    return interop.build(tmp_path_factory.mktemp("interop"))


@pytest.fixture
def clients(shared_lab: Lab, interop_program: Path) -> Interop:
    return Interop(interop_program, shared_lab.daemon.socket)
