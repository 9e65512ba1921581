"""Reads CDI spec files and the devices that they name. Not their meaning, which is `cri_shim.spec.cdi`.

Everything blocks and belongs into a thread. Invariant: a container gets what the files say at its creation. They are
few and small and read only for a container that has CDI devices, so that nothing is kept and nothing has to be watched.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from cri_shim.model.errors import FailedPrecondition
from cri_shim.spec import cdi

_SUFFIXES: Final = {".json": False, ".yaml": True}
"""Of spec files; True = YAML."""
_LIMIT: Final = 4 << 20
"""Bytes of a spec file."""


def edits(names: Sequence[str], directories: Sequence[Path]) -> cdi.Edits:
    """What the named devices change in a container; of the directories, later ones win.

    FailedPrecondition names the device that is not to be had, and the files that could have been about it.
    """
    files: list[cdi.SpecFile] = []
    broken: list[str] = []
    for priority, directory in enumerate(directories):
        for path in _spec_files(directory):
            try:
                files.append(cdi.SpecFile(str(path), priority, _read(path)))
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                broken.append(f"{path} cannot be used: {why}")
    try:
        found = cdi.resolve(names, files)
    except FailedPrecondition as error:
        hint = "; ".join(broken) or f"spec files are looked for in {', '.join(map(str, directories))}"
        raise FailedPrecondition(error.cause, hint=hint) from error
    return msgspec.structs.replace(found, device_nodes=tuple(_completed(node) for node in found.device_nodes))


def _spec_files(directory: Path) -> Iterator[Path]:
    try:
        paths = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        msg = f"CDI_devices: {directory}: {error.strerror}"
        raise FailedPrecondition(msg) from error
    for path in paths:
        if path.suffix in _SUFFIXES and path.is_file():
            yield path


def _read(path: Path) -> cdi.Spec:
    with path.open("rb") as file:
        data = file.read(_LIMIT + 1)
    if len(data) > _LIMIT:
        raise ValueError(f"it is larger than {_LIMIT} bytes")
    return cdi.parse_spec(data, yaml=_SUFFIXES[path.suffix])


def _completed(node: cdi.DeviceNode) -> cdi.DeviceNode:
    """The node with type, numbers and mode; what the file does not say is that of the host's device."""
    if node.type == "p" or (node.type and node.major):
        return node
    host_path = node.host_path or node.path
    try:
        status = os.stat(host_path)  # noqa: PTH116  of a file, a string
    except OSError as error:
        msg = f"CDI_devices: device {host_path}: {error.strerror}"
        raise FailedPrecondition(msg) from error
    kind = _kind(status.st_mode)
    if kind is None or node.type not in {"", kind, "u" if kind == "c" else kind}:
        msg = f"CDI_devices: {host_path} is not a device of the type that its spec file says"
        raise FailedPrecondition(msg)
    return msgspec.structs.replace(
        node,
        type=kind,
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        file_mode=stat.S_IMODE(status.st_mode) if node.file_mode is None else node.file_mode,
    )


def _kind(mode: int) -> str | None:
    if stat.S_ISBLK(mode):
        return "b"
    if stat.S_ISCHR(mode):
        return "c"
    return "p" if stat.S_ISFIFO(mode) else None
