"""Which namespaces a container joins, gets for itself, or leaves with the host.

Not what makes and pins the pod's. Invariant: a container is in the network, IPC and UTS namespace of its pod,
whatever it asks for.
"""

from __future__ import annotations

from pathlib import Path

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.handler import ContainerPlan, PodContext
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.facts import HostFacts, Json


def namespaces(plan: ContainerPlan, host: HostFacts) -> list[Json]:
    """`linux.namespaces` (OCI runtime-spec, config-linux); a namespace that is not listed is the host's."""
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


def pid_mode(plan: ContainerPlan) -> pb.NamespaceMode.ValueType:
    """The PID namespace in effect. A container that says nothing, or POD in a pod of the host's, follows its pod."""
    of_pod = plan.pod.config.linux.security_context.namespace_options.pid
    if not plan.config.linux.security_context.HasField("namespace_options"):
        return of_pod
    own = plan.config.linux.security_context.namespace_options.pid
    follows = own == pb.NamespaceMode.POD and of_pod == pb.NamespaceMode.NODE
    return of_pod if follows else own


def _of_pod(pod: PodContext) -> list[Json]:
    pins: tuple[tuple[str, Path | None], ...] = (("network", pod.net), ("ipc", pod.ipc), ("uts", pod.uts))
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
