"""What a worker gets: identity, limits, network, from the plan of a container. Decisions on values of the node."""

from __future__ import annotations

import posixpath

import msgspec

from cri_shim.adapters.context import HandlerContext
from cri_shim.adapters.limit_facts import limit_facts
from cri_shim.model.handler import ContainerPlan
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.resources import oom_score_adj, resources
from cri_shim.spec.security import wanted_capabilities
from handlers.wasmtime.guest_spec import WorkerSpec


def worker_spec(plan: ContainerPlan, why: str, context: HandlerContext) -> WorkerSpec:
    """Errors as in `cri_shim.spec.resources`."""
    limits = resources(plan.config.linux.resources, limit_facts(context))
    return msgspec.structs.replace(identity(plan, why, context), limits=limits)


def identity(plan: ContainerPlan, why: str, context: HandlerContext) -> WorkerSpec:
    """Of a further process of a container in the daemon, which is there for the reason `why`. The engine has limits."""
    user = plan.process.user
    mounted = {posixpath.normpath(mount.container_path): mount.host_path for mount in plan.config.mounts}
    capabilities = wanted_capabilities(plan.config.linux.security_context) & context.capabilities
    return WorkerSpec(
        why=why,
        uid=user.uid,
        gid=user.gid,
        groups=user.groups,
        capabilities=tuple(sorted(capabilities)) if user.uid == 0 else (),
        oom_score_adj=oom_score_adj(plan.config.linux.resources, limit_facts(context)),
        netns=str(plan.pod.net) if plan.pod.net is not None else "",
        cgroup_parent=plan.pod.cgroup_parent,
        limits={},
        hosts=mounted.get("/etc/hosts", str(plan.pod.hosts)),
        resolv_conf=mounted.get("/etc/resolv.conf", str(plan.pod.resolv_conf)),
    )


def worker_limits(worker: WorkerSpec, asked: pb.LinuxContainerResources, context: HandlerContext) -> WorkerSpec:
    """The same worker with these limits. Errors as in `cri_shim.spec.resources`."""
    host = limit_facts(context)
    return msgspec.structs.replace(worker, oom_score_adj=oom_score_adj(asked, host), limits=resources(asked, host))
