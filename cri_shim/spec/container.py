"""The OCI runtime spec of a container, composed of its parts; an infra container's too.

Not a reader of anything: plan and facts in, config.json out. Invariant: every field of the request is honoured here or
refused with an error that names it.
"""

from __future__ import annotations

from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import ContainerPlan, ExecRequest, TerminalRequest
from cri_shim.spec import (
    apparmor,
    base_spec,
    cdi,
    cgroup_plan,
    devices,
    hooks,
    mounts,
    namespaces,
    resources,
    security,
    selinux,
    users,
)
from cri_shim.spec.dispatch import OCI_HANDLER
from cri_shim.spec.facts import ContainerFacts, HostFacts, Json
from cri_shim.spec.runtime_annotations import runtime_annotations
from cri_shim.spec.unsupported import refuse_unsupported


def build(plan: ContainerPlan, host: HostFacts, found: ContainerFacts) -> Json:
    """config.json of the plan's container (OCI runtime-spec 1.x). Raises for what cannot be honoured."""
    refuse_unsupported(plan.config, host)
    _check_engine(plan, host)
    selinux.check_options(plan.config.linux.security_context.selinux_options, plan.selinux, enabled=host.selinux)
    users.check_mapped(plan.process.user, plan.pod.ids)
    wanted = plan.config.linux.security_context
    propagation = mounts.rootfs_propagation(plan.config.mounts)
    document: Json = {
        "ociVersion": host.oci_version,
        "process": _process(plan, host, found),
        "root": {"path": str(plan.rootfs), "readonly": wanted.readonly_rootfs},
        "mounts": mounts.mounts(plan, found),
        "annotations": {**runtime_annotations(plan), **cgroup_plan.annotations_for_spec(host.cgroup_driver)},
        "linux": {
            "cgroupsPath": cgroup_plan.cgroups_path_for_spec(plan.pod.cgroup_parent, plan.id, host.cgroup_driver),
            "namespaces": namespaces.namespaces(plan, host),
            **namespaces.id_mappings(plan.pod.ids),
            **_devices_and_resources(plan, host, found),
            **security.masks(wanted),
            **_present("seccomp", security.seccomp(wanted, host, found)),
            **_present("rootfsPropagation", propagation),
            **_present("mountLabel", plan.selinux.mount if plan.selinux else None),
        },
    }
    if plan.infra:
        return document
    if host.base_spec:
        document = base_spec.onto(host.base_spec, document)
    if fitting := hooks.of_container(found.hooks, _hooked(plan)):
        document["hooks"] = hooks.merged(document.get("hooks", {}), fitting)
    return cdi.apply(document, found.cdi) if cdi.device_names(plan.config) else document


def _check_engine(plan: ContainerPlan, host: HostFacts) -> None:
    """Whether the runtime can run a module by itself (`wasm: native`)."""
    if plan.annotations.get(OCI_HANDLER) != "wasm":
        return
    if not host.wasm_engine:
        msg = "the handler has wasm: native, but its runtime was built without a Wasm engine"
        raise FailedPrecondition(msg, hint="`crun --version` says +WASM where it has one; wasm: executor needs none")
    if plan.rootfs is None:
        msg = "image.image is a Wasm artifact, which has no files, and a runtime's own engine runs a file of an image"
        raise FailedPrecondition(msg, hint="use an image with the module in it, or a handler of kind wasmtime")


def clamped(plan: ContainerPlan, host: HostFacts) -> list[str]:
    """What of the request by name the node cannot give, so that `build` gives less: one clause each."""
    wanted = plan.config.linux.security_context
    missing = security.added_capabilities(wanted) - host.capabilities
    found = [f"capability {name}" for name in sorted(missing)]
    asked = plan.config.linux.resources
    if resources.oom_score_adj(asked, host) != asked.oom_score_adj:
        found.append(f"oom_score_adj below {host.lowest_oom_score_adj}")
    return found


def exec_process(process: Json, request: ExecRequest | TerminalRequest) -> Json:
    """The process of an exec: that of the container, with other arguments (contract: ExecSync, exec defaults)."""
    further = {**process, "args": list(request.args), "terminal": False}
    if isinstance(request, ExecRequest):
        return further
    env, size = process["env"], request.size
    if not any(variable.startswith("TERM=") for variable in env):
        env = [*env, "TERM=xterm"]
    console = {"consoleSize": {"height": size.height, "width": size.width}} if size else {}
    return {**further, "terminal": True, "env": env, **console}


def _process(plan: ContainerPlan, host: HostFacts, found: ContainerFacts) -> Json:
    """`process`. The CRI has no rlimits: what the handler's configuration does not set is as the daemon has it."""
    process, wanted = plan.process, plan.config.linux.security_context
    user: Json = {"uid": process.user.uid, "gid": process.user.gid, "additionalGids": list(process.user.groups)}
    return {
        "terminal": process.tty,
        "user": user,
        "args": list(process.args),
        "env": list(process.env),
        "cwd": process.cwd,
        "capabilities": security.capabilities(wanted, host),
        "noNewPrivileges": wanted.no_new_privs,
        "oomScoreAdj": resources.oom_score_adj(plan.config.linux.resources, host),
        **_present("rlimits", [] if plan.infra else list(host.rlimits)),
        **_present("selinuxLabel", plan.selinux.process if plan.selinux and not wanted.privileged else None),
        **_present("apparmorProfile", apparmor.profile_name(wanted, host, found)),
    }


def _hooked(plan: ContainerPlan) -> hooks.Subject:
    annotations = {**plan.pod.config.annotations, **plan.config.annotations}
    return hooks.Subject(next(iter(plan.process.args), ""), annotations, bind_mounts=bool(plan.config.mounts))


def _devices_and_resources(plan: ContainerPlan, host: HostFacts, found: ContainerFacts) -> Json:
    nodes, rules = devices.devices(plan.config, host, found)
    limits = {**resources.resources(plan.config.linux.resources, host), **_present("blockIO", found.block_io)}
    return {"devices": nodes, "resources": {"devices": rules, **limits}}


def _present(key: str, value: Json | list[Json] | str | None) -> Json:
    return {key: value} if value else {}
