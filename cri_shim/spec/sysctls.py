"""The sysctls of a pod: what a request and the node's defaults may set in the pod's own namespaces.

Not the setting. Invariant: nothing outside of a namespace of the pod's own is ever set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from cri_shim.model.errors import InvalidArgument
from cri_shim.model.user_namespace import UserNamespace

_NAME = re.compile(r"[a-z0-9_-]+(?:[./][A-Za-z0-9_*-]+)+")
_IPC = ("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")
_MAX_PING_GROUP = 2**31 - 1


def sysctls(
    asked: Mapping[str, str], defaults: Mapping[str, str], user: UserNamespace | None, *, net: bool, ipc: bool
) -> dict[str, str]:
    """What to set, by name; `user`, `net` and `ipc` say which namespaces are the pod's own.

    Of the handler's `defaults` those for a namespace of the node are left out. InvalidArgument for what is asked and
    cannot be set.
    """
    own = {"network": net, "IPC": ipc}
    result = _unprivileged_defaults(user) if net else {}
    result |= {name: value for name, value in defaults.items() if own[namespace_of(name, "default_sysctls")]}
    for name, value in asked.items():
        namespace = namespace_of(name, "linux.sysctls")
        if not own[namespace]:
            msg = f"linux.sysctls: {name} needs a {namespace} namespace of the pod's own"
            raise InvalidArgument(msg)
        result[name] = value
    return result


def _unprivileged_defaults(user: UserNamespace | None) -> dict[str, str]:
    """As containerd sets them: a pod's own network has no ports worth protecting from the pod itself."""
    highest = min(user.gids.length - 1, _MAX_PING_GROUP) if user is not None else _MAX_PING_GROUP
    return {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": f"0 {highest}"}


def namespace_of(name: str, field: str) -> str:
    """`network` or `IPC`. InvalidArgument for what is no sysctl or the whole node's."""
    dotted = name.replace("/", ".")
    if _NAME.fullmatch(name) is None or ".." in name:
        msg = f"{field}: {name!r} is not the name of a sysctl"
        raise InvalidArgument(msg)
    if dotted.startswith("net."):
        return "network"
    if dotted.startswith(_IPC):
        return "IPC"
    msg = f"{field}: {name} is not namespaced, it would change the whole node"
    raise InvalidArgument(msg)
