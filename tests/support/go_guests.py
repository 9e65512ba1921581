"""Guests built from Go source by the stock toolchain, once per run. Not for clients of the daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

_SOURCES: Final = Path(__file__).parent.parent / "guests"
_BUILD_SECONDS: Final = 600
_USUAL: Final = "/usr/local/go/bin/go"


def program() -> str | None:
    """The `go` command; None when there is none."""
    return shutil.which("go") or (_USUAL if os.access(_USUAL, os.X_OK) else None)


def build(name: str, directory: Path) -> bytes:
    """The module of `tests/guests/NAME`, compiled for WASI preview 1. `directory` is for the toolchain's cache."""
    go, target = program(), directory / f"{name}.wasm"
    if go is None:
        msg = "no Go"
        raise RuntimeError(msg)
    environment = {
        **os.environ,
        "GOOS": "wasip1",
        "GOARCH": "wasm",
        "GOFLAGS": "-mod=mod -buildvcs=false",
        "GOTOOLCHAIN": "local",
        "GOCACHE": str(directory / "cache"),
    }
    command = [go, "build", "-ldflags=-s -w", f"-o={target}", "."]
    subprocess.run(command, cwd=_SOURCES / name, env=environment, check=True, timeout=_BUILD_SECONDS)
    return target.read_bytes()
