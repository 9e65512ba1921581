"""An OCI runtime that is able to give containers user namespaces and idmapped mounts: crun 1.9, runc 1.2 or later.

Debian 12 has none; `scripts/fetch-crun` brings the one of Debian 13.
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


def is_able(program: str) -> bool:
    """Whether the binary says so itself."""
    try:
        said = subprocess.run([program, "features"], capture_output=True, check=True).stdout
        return parse_features(said).user_namespaces
    except (OSError, subprocess.CalledProcessError, CriShimError):
        return False
