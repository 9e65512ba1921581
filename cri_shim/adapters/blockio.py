"""Reads the classes of block IO and finds their devices. Not their meaning, which is `cri_shim.spec.blockio`.

Everything blocks and belongs into a thread. Invariant: the file is read for each container that names a class, so that
a change needs no restart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.blockio import Disk, asked_class, block_io, parse_classes
from cri_shim.spec.facts import Json


def of_container(config: pb.ContainerConfig, pod: pb.PodSandboxConfig, file: str) -> Json:
    """`linux.resources.blockIO` of the class that the annotations name, empty for none. Errors name the annotation."""
    annotation, name = asked_class(config.metadata.name, config.annotations, pod.annotations)
    if not name:
        return {}
    if not file:
        msg = f"annotation {annotation}: {name!r}: this handler has no classes of block IO"
        raise FailedPrecondition(msg, hint="the node's administrator names their file in blockio_config_file")
    try:
        classes = parse_classes(Path(file).read_bytes()).classes
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        msg = f"annotation {annotation}: blockio_config_file {file} cannot be used: {why}"
        raise FailedPrecondition(msg) from error
    if name not in classes:
        msg = f"annotation {annotation}: there is no class {name[:200]!r} of block IO"
        raise InvalidArgument(msg, hint=f"there are: {', '.join(sorted(classes))}")
    return block_io(classes[name], disks)


def disks(pattern: str) -> Iterator[Disk]:
    """The whole disks behind the block devices that fit a glob: the kernel limits no single partition."""
    for path in sorted(Path("/").glob(pattern.lstrip("/"))):
        if path.is_block_device():
            device = path.stat().st_rdev
            yield _whole(Disk(os.major(device), os.minor(device)))


def _whole(disk: Disk) -> Disk:
    device = Path(f"/sys/dev/block/{disk.major}:{disk.minor}")
    if not (device / "partition").exists():
        return disk
    major, _, minor = (device.resolve().parent / "dev").read_text().strip().partition(":")
    return Disk(int(major), int(minor))
