"""The error of a full disk, which is the same whoever meets it: a blob, a layer, a compiled module, the database."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator
from pathlib import Path
from typing import Final

from cri_shim.model.errors import ResourceExhausted

NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextlib.contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn "disk full" into a ResourceExhausted that names the file system."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_full(path) from error
        raise


def disk_full(path: Path) -> ResourceExhausted:
    """The error for a file system without room."""
    hint = "remove images that are not used, or give it more space"
    return ResourceExhausted(f"no space left on the file system of {path}", hint=hint)
