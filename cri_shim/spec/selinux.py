"""SELinux labels of pods and containers: the policy's contexts, a level per pod, and what a request says of them.

Not the setting of any. Invariant: two pods share a level only when a request names it; the containers of a pod share
its level unless they ask for another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.ids import PodId
from cri_shim.model.selinux import Contexts, Label
from cri_shim.pb import api_pb2 as pb

_FIELD = "linux.security_context.selinux_options"
_CATEGORIES = 1024
_KEYS = ("process", "file")
_WORD = re.compile(r"[A-Za-z0-9_.-]+")
_SYNTAX = {"user": _WORD, "role": _WORD, "type": _WORD, "level": re.compile(r"[A-Za-z0-9_.,:-]+")}
# Of the node, whoever asks: with a container's label nobody else could use them.
_NEVER_RELABELED = frozenset(
    {
        *("/", "/bin", "/boot", "/dev", "/etc", "/etc/passwd", "/etc/pki", "/etc/shadow", "/home", "/lib", "/lib64"),
        *("/media", "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var", "/var/lib"),  # noqa: S108
        *("/var/log", "/var/run"),
    }
)


def parse_contexts(text: str) -> Contexts | None:
    """The contexts of a policy's `lxc_contexts`; None when it has none for containers."""
    pairs = (line.partition("=") for line in text.splitlines() if not line.lstrip().startswith("#"))
    found = {key.strip(): value.strip().strip('"') for key, _, value in pairs}
    if not all(found.get(key, "").count(":") >= 2 for key in _KEYS):
        return None
    return Contexts(found["process"], found["file"])


def choose_level(contexts: Contexts, asked: pb.SELinuxOption, pod_id: PodId, used: Collection[str]) -> str:
    """The level of a pod: as asked, else two categories that no other pod has; empty where the policy has none."""
    sensitivity = _parts(contexts.process)[3].partition("-")[0].partition(":")[0]
    if asked.level or not sensitivity:
        return asked.level
    start = int.from_bytes(hashlib.sha256(pod_id.encode()).digest()[:8])
    for step in range(_CATEGORIES * _CATEGORIES):
        first, second = divmod((start + step) % (_CATEGORIES * _CATEGORIES), _CATEGORIES)
        level = f"{sensitivity}:c{first},c{second}"
        if first < second and level not in used:
            return level
    msg = f"{_FIELD}: every pair of SELinux categories belongs to a pod"
    raise FailedPrecondition(msg)


def pod_label(contexts: Contexts, asked: pb.SELinuxOption, level: str) -> Label:
    """The label of a pod, whose level has been chosen."""
    options = pb.SELinuxOption(user=asked.user, role=asked.role, type=asked.type, level=level)
    return with_options(Label(contexts.process, contexts.file), options)


def with_options(label: Label, asked: pb.SELinuxOption) -> Label:
    """The label with what a request changes of it. InvalidArgument for what can be no part of a label."""
    for field, pattern in _SYNTAX.items():
        value: str = getattr(asked, field)
        if value and pattern.fullmatch(value) is None:
            msg = f"{_FIELD}.{field}: {value[:100]!r} cannot be a part of a label"
            raise InvalidArgument(msg)
    user, role, kind, level = _parts(label.process)
    process = (asked.user or user, asked.role or role, asked.type or kind, asked.level or level)
    user, role, kind, level = _parts(label.mount)
    mount = (asked.user or user, role, kind, asked.level or level)
    return Label(_joined(process), _joined(mount))


def check_options(asked: pb.SELinuxOption, label: Label | None, *, enabled: bool) -> None:
    """Refuse options where there are no labels. FailedPrecondition says what the node lacks."""
    if asked == pb.SELinuxOption() or label is not None:
        return
    msg = f"{_FIELD}: SELinux is not enabled on this node"
    if enabled:
        msg = f"{_FIELD}: this node's SELinux policy has no contexts for containers (lxc_contexts)"
    raise FailedPrecondition(msg)


def check_relabel(path: str, field: str) -> None:
    """Refuse to give away what is the node's own; `path` has no symlinks."""
    if path in _NEVER_RELABELED:
        msg = f"mounts: selinux_relabel of {field}: {path} belongs to the node and is not relabeled"
        raise InvalidArgument(msg)


def _parts(label: str) -> tuple[str, str, str, str]:
    user, role, kind, *level = label.split(":", 3)
    return user, role, kind, level[0] if level else ""


def _joined(parts: tuple[str, str, str, str]) -> str:
    return ":".join(part for part in parts if part)
