"""Guests built from Rust source for WASI 0.2, where a toolchain with that target is. Not for clients of the daemon."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

_SOURCES: Final = Path(__file__).parent.parent / "guests"
_TARGET: Final = "wasm32-wasip2"
_USUAL: Final = Path.home() / ".cargo" / "bin" / "rustc"
_BUILD_SECONDS: Final = 300


def program() -> str | None:
    """The `rustc` command; None when there is none that has the target."""
    command = shutil.which("rustc") or str(_USUAL)
    try:
        asked = [command, "--print", "target-libdir", "--target", _TARGET]
        found = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        return None
    return command if Path(found.stdout.strip()).is_dir() else None


def build(name: str, directory: Path) -> bytes:
    """The component of `tests/guests/NAME`."""
    rustc, target = program(), directory / f"{name}.wasm"
    if rustc is None:
        msg = f"no Rust for {_TARGET}"
        raise RuntimeError(msg)
    command = [rustc, "--edition=2021", "-O", "--target", _TARGET, "-o", str(target), "main.rs"]
    subprocess.run(command, cwd=_SOURCES / name, check=True, timeout=_BUILD_SECONDS)
    return target.read_bytes()
