"""The host side of a container's mounts: made when missing, or missed by name, as the configuration says.

Not the mounting. Blocks: for a thread. Invariant: only directories are made, 0755, and never below a symlink that leads
nowhere.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable
from pathlib import Path

from cri_shim.model.errors import FailedPrecondition
from cri_shim.pb import api_pb2 as pb


class MissingSource(enum.Enum):
    """The setting `missing_mount_source`: as the other CRI runtimes do, or as the text of the CRI says."""

    CREATE = "create"
    ERROR = "error"


def ensure(mounts: Iterable[pb.Mount], missing: MissingSource) -> None:
    """See to it that every `host_path` exists. FailedPrecondition names the one that does not and cannot."""
    for mount in mounts:
        path = Path(mount.host_path)
        if not mount.host_path or os.path.exists(path):  # noqa: PTH110  Path.exists raises for a name that is too long
            continue
        if missing is MissingSource.ERROR:
            msg = f"mounts: host_path {mount.host_path} does not exist"
            raise FailedPrecondition(msg, hint="create it, or set missing_mount_source: create")
        try:
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            msg = f"mounts: host_path {mount.host_path} is missing and cannot be made: {error.strerror}"
            raise FailedPrecondition(msg) from error
