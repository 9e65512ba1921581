"""Guests built from Go source by the stock toolchain, once per run. Not for clients of the daemon.

For a machine without the toolchain `python -m tests.support.go_guests DIRECTORY` builds them on another one; the
variable CRI_SHIM_GO_GUESTS names their directory there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

_SOURCES: Final = Path(__file__).parent.parent / "guests"
_BUILD_SECONDS: Final = 600
_USUAL: Final = "/usr/local/go/bin/go"
_BUILT: Final = "CRI_SHIM_GO_GUESTS"


def program() -> str | None:
    """The `go` command; None when there is none."""
    return shutil.which("go") or (_USUAL if os.access(_USUAL, os.X_OK) else None)


def find(name: str, directory: Path) -> bytes | None:
    """The module of `tests/guests/NAME` for WASI preview 1; None when it can neither be built nor has been.

    `directory` is for the toolchain's cache.
    """
    if built := os.environ.get(_BUILT):
        return (Path(built) / f"{name}.wasm").read_bytes()
    go, target = program(), directory / f"{name}.wasm"
    if go is None:
        return None
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


def main(argv: list[str]) -> int:
    """Build all of them."""
    directory = Path(argv[0]).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    for source in _SOURCES.glob("*/go.mod"):
        if find(source.parent.name, directory) is None:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
