"""SELinux labels put to use: known to the policy in force, and given to the volumes of a container.

Not their making (`cri_shim.spec.selinux`). Everything blocks and belongs into a thread. Invariant: what belongs to the
node is never relabeled, whatever a request says.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cri_shim.kernel import selinux
from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.selinux import Label
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.selinux import check_relabel


def check(label: Label) -> None:
    """InvalidArgument for one that the policy does not know."""
    for text in (label.process, label.mount):
        if not selinux.is_valid(text):
            msg = f"linux.security_context.selinux_options: {text} is no label of this node's SELinux policy"
            raise InvalidArgument(msg)


def relabel_volumes(mounts: Iterable[pb.Mount], label: Label) -> None:
    """Give the sources of mounts with `selinux_relabel` the container's label, as far as they are."""
    for mount in mounts:
        if not mount.selinux_relabel:
            continue
        source = Path(mount.host_path).resolve()
        check_relabel(str(source), mount.container_path)
        try:
            selinux.relabel(source, label.mount)
        except OSError as error:
            msg = f"mounts: selinux_relabel of {mount.container_path}: {error.filename}: {error.strerror}"
            raise FailedPrecondition(msg) from error
