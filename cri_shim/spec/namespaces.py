"""Which namespaces a container joins, gets for itself, or leaves with the host, and the ids of a user namespace.

Not what makes and pins the pod's. Invariant: a container is in the user, network, IPC and UTS namespace of its pod.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.handler import ContainerPlan, PodContext
from cri_shim.model.user_namespace import IdRange, UserNamespace
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.facts import HostFacts, Json

USERNS = "linux.security_context.namespace_options.userns_options"
_MAX_HOST_ID = 2**32 - 2
"""The highest id; 2^32 - 1 stands for none."""


def user_namespace(options: pb.NamespaceOption) -> UserNamespace | None:
    """The user namespace that a request asks for, None for the node's. InvalidArgument for any but one mapping of 0."""
    if not options.HasField("userns_options"):
        return None
    asked = options.userns_options
    if asked.mode == pb.NamespaceMode.NODE:
        if asked.uids or asked.gids:
            msg = f"{USERNS}: mode NODE has no mappings, but uids or gids are given"
            raise InvalidArgument(msg)
        return None
    if asked.mode != pb.NamespaceMode.POD:
        msg = f"{USERNS}.mode: {pb.NamespaceMode.Name(asked.mode)} is no mode of user namespaces"
        raise InvalidArgument(msg, hint="use POD or NODE")
    return UserNamespace(_range("uids", asked.uids), _range("gids", asked.gids))


def _range(field: str, mappings: Sequence[pb.IDMapping]) -> IdRange:
    if len(mappings) != 1:
        msg = f"{USERNS}.{field}: exactly one mapping is needed, there are {len(mappings)}"
        raise InvalidArgument(msg)
    mapping = mappings[0]
    if mapping.container_id != 0 or mapping.length == 0:
        msg = f"{USERNS}.{field}: the mapping has to hold id 0 of the container"
        raise InvalidArgument(msg)
    if mapping.host_id + mapping.length - 1 > _MAX_HOST_ID:
        msg = f"{USERNS}.{field}: {mapping.length} ids from {mapping.host_id} on are more than the host has"
        raise InvalidArgument(msg)
    return IdRange(mapping.host_id, mapping.length)


def namespaces(plan: ContainerPlan, host: HostFacts) -> list[Json]:
    """`linux.namespaces` (OCI runtime-spec, config-linux); a namespace that is not listed is the host's."""
    _check_user_namespace(plan)
    listed: list[Json] = [{"type": "mount"}, *_of_pod(plan.pod)]
    match pid_mode(plan):
        case pb.NamespaceMode.CONTAINER:
            listed.append({"type": "pid"})
        case pb.NamespaceMode.POD:
            listed.append(_shared_pid(plan.pod))
        case pb.NamespaceMode.TARGET:
            listed.append(_target_pid(plan))
        case pb.NamespaceMode.NODE:
            pass
        case unknown:
            msg = f"linux.security_context.namespace_options.pid: {unknown} is not a namespace mode"
            raise InvalidArgument(msg)
    if host.cgroup_version == 2 and not plan.config.linux.security_context.privileged:
        listed.append({"type": "cgroup"})
    return listed


def _check_user_namespace(plan: ContainerPlan) -> None:
    """What a container says of a user namespace has to be what its pod has."""
    options = plan.config.linux.security_context.namespace_options
    if options.HasField("userns_options") and user_namespace(options) != plan.pod.ids:
        msg = f"{USERNS} differs from that of the pod sandbox"
        raise InvalidArgument(msg, hint="say the same, or leave it out")
    if plan.pod.ids is not None and pid_mode(plan) == pb.NamespaceMode.NODE:
        msg = "linux.security_context.namespace_options.pid: NODE goes with userns_options.mode NODE only"
        raise InvalidArgument(msg, hint="the pod has a user namespace of its own")


def id_mappings(ids: UserNamespace | None) -> Json:
    """`uidMappings` and `gidMappings` (OCI runtime-spec, config-linux); nothing without a user namespace."""
    if ids is None:
        return {}
    both = (("uidMappings", ids.uids), ("gidMappings", ids.gids))
    return {key: [{"containerID": 0, "hostID": of.first, "size": of.length}] for key, of in both}


def pid_mode(plan: ContainerPlan) -> pb.NamespaceMode.ValueType:
    """The PID namespace in effect. A container that says nothing, or POD in a pod of the host's, follows its pod."""
    of_pod = plan.pod.config.linux.security_context.namespace_options.pid
    if not plan.config.linux.security_context.HasField("namespace_options"):
        return of_pod
    own = plan.config.linux.security_context.namespace_options.pid
    follows = own == pb.NamespaceMode.POD and of_pod == pb.NamespaceMode.NODE
    return of_pod if follows else own


def _of_pod(pod: PodContext) -> list[Json]:
    pins: tuple[tuple[str, Path | None], ...] = (
        *(("user", pod.user), ("network", pod.net)),
        *(("ipc", pod.ipc), ("uts", pod.uts)),
    )
    return [{"type": kind, "path": str(pin)} for kind, pin in pins if pin is not None]


def _shared_pid(pod: PodContext) -> Json:
    if pod.pid is None:
        msg = "linux.security_context.namespace_options.pid is POD, but the pod was made without a shared PID namespace"
        raise InvalidArgument(msg, hint="set pid to POD in the pod's namespace_options too, or to CONTAINER here")
    return {"type": "pid", "path": str(pod.pid)}


def _target_pid(plan: ContainerPlan) -> Json:
    if not plan.target_pid:
        target = plan.config.linux.security_context.namespace_options.target_id
        msg = f"linux.security_context.namespace_options.target_id: container {target!r} has no process to join"
        raise FailedPrecondition(msg, hint="the target must be a running Linux container of the same pod")
    return {"type": "pid", "path": f"/proc/{plan.target_pid}/ns/pid"}
