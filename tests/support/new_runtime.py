"""OCI runtimes with what Debian 12's lack: user namespaces with idmapped mounts (crun 1.9, runc 1.2), a Wasm engine.

Debian 13's crun has both; `scripts/fetch-crun` brings it, and the engine with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from cri_shim.model.errors import CriShimError
from cri_shim.wire.oci_state import parse_features

VARIABLE = "CRI_SHIM_NEW_RUNTIME"
"""In the environment: another one to test with."""
_FETCHED = Path(__file__).parents[2] / ".runtimes" / "crun"


@cache
def new_runtime() -> str | None:
    """The path of one; None when there is none on this machine."""
    found = (os.environ.get(VARIABLE), shutil.which("crun"), str(_FETCHED))
    return next((program for program in found if program and is_able(program)), None)


@cache
def runtime_with_engine() -> str | None:
    """The path of a crun that runs modules by itself; None when there is none on this machine."""
    found = (shutil.which("crun"), str(_FETCHED))
    return next((program for program in found if program and _has_engine(program)), None)


def is_able(program: str) -> bool:
    """Whether the binary says so itself."""
    try:
        said = subprocess.run([program, "features"], capture_output=True, check=True).stdout
        return parse_features(said).user_namespaces
    except (OSError, subprocess.CalledProcessError, CriShimError):
        return False


def _has_engine(program: str) -> bool:
    try:
        said = subprocess.run([program, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return b"+WASM" in said
