"""Reads the hook files of a node. Not their meaning, which is `cri_shim.spec.hooks`.

Everything blocks and belongs into a thread. Invariant: a container gets what the files say at its creation; nothing is
kept and nothing has to be watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cri_shim.model.errors import FailedPrecondition
from cri_shim.spec.hooks import HookFile, parse_hook

_LIMIT: Final = 1 << 20
"""Bytes of a file."""


def hook_files(directories: Sequence[Path]) -> list[HookFile]:
    """The files `*.json` of all directories in the order of their names, whatever their case.

    Of two with one name that of the later directory counts. FailedPrecondition names a file that cannot be used.
    """
    paths: dict[str, Path] = {}
    for directory in directories:
        try:
            paths |= {path.name: path for path in directory.iterdir() if path.suffix == ".json"}
        except FileNotFoundError:
            continue
        except OSError as error:
            msg = f"hooks_dirs: {directory}: {error.strerror}"
            raise FailedPrecondition(msg) from error
    return [_read(paths[name]) for name in sorted(paths, key=lambda name: (name.lower(), name))]


def _read(path: Path) -> HookFile:
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT + 1)
        if len(data) > _LIMIT:
            raise ValueError(f"it is larger than {_LIMIT} bytes")
        return parse_hook(data)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        msg = f"hooks_dirs: {path} cannot be used: {why}"
        raise FailedPrecondition(msg, hint="correct it, or move it out of the directory") from error
