"""Archives as Go's `archive/tar` writes them, which docker, buildah, kaniko, ko and crane are built on.

    write = go_archives.build(directory)
    write([entry("etc/", "5", 0o755), entry("etc/motd", data=b"hello\\n")], "PAX")

Not for what no tool in Go could write: see `tests.support.images`. Invariant: the library decides about every byte.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from tests.support import go_guests

_SOURCE: Final = Path(__file__).parent.parent / "builders"

Entry: TypeAlias = dict[str, Any]
Write: TypeAlias = Callable[..., bytes]


def build(directory: Path) -> Write:
    """The program, built once; call the result with entries and a format (USTAR, PAX, GNU; empty: the library's)."""
    go, program = go_guests.program(), directory / "builders"
    assert go is not None
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false", "GOTOOLCHAIN": "local"}
    subprocess.run([go, "build", "-o", str(program), "."], cwd=_SOURCE, env=environment, check=True, timeout=600)

    def write(entries: Sequence[Entry], tar_format: str = "") -> bytes:
        headers = json.dumps([{**entry, "Format": tar_format} for entry in entries])
        return subprocess.run([program], input=headers.encode(), check=True, stdout=subprocess.PIPE).stdout

    return write


def entry(name: str, kind: str = "0", mode: int = 0o644, *, data: bytes = b"", **more: object) -> Entry:
    """One header: `kind` as in the archive; `more` are fields of Go's (Link, Uid, Seconds, Records…)."""
    return {"Name": name, "Type": kind, "Mode": mode, "Data": base64.b64encode(data).decode(), **more}
