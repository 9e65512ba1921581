"""Fixtures of the contract tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def module_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `root` for all benches of the run, so that each module is compiled once."""
    return tmp_path_factory.mktemp("root")
