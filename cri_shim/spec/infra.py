"""The infra container of a pod with a shared PID namespace: catatonit, which reaps what the others leave behind.

Not a process of the host: through `/proc/1/root` every container of the pod sees its root file system, which holds this
one program and nothing else. Invariant: no capability, no new privileges, filtered, read-only, in the pod's cgroup.
"""

from __future__ import annotations

from pathlib import Path

from cri_shim.model.container import User
from cri_shim.model.handler import ContainerPlan, PodContext, ProcessPlan
from cri_shim.model.ids import ContainerId
from cri_shim.model.layout import Layout
from cri_shim.model.user_namespace import UserNamespace
from cri_shim.pb import api_pb2 as pb

PROGRAM = "/catatonit"
"""Where the program is inside."""

_USER = 65535

# What procfs shows of the host to whoever has root in the pod.
_MASKED = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/scsi", "/proc/timer_list")
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def plan(pod: PodContext, layout: Layout, program: Path) -> ContainerPlan:
    """The plan of a pod's infra container, whose id is the pod's.

    `program` is catatonit on the host, statically linked. The caller makes the bundle and the empty root file system
    (`Layout.rootfs`).
    """
    security = pb.LinuxContainerSecurityContext(
        namespace_options=pb.NamespaceOption(pid=pb.NamespaceMode.CONTAINER),
        capabilities=pb.Capability(drop_capabilities=["ALL"]),
        no_new_privs=True,
        readonly_rootfs=True,
        masked_paths=_MASKED,
        readonly_paths=_READ_ONLY,
        seccomp=_never_unconfined(pod.config.linux.security_context.seccomp),
    )
    if pod.config.linux.security_context.apparmor.profile_type == pb.SecurityProfile.Localhost:
        security.apparmor.CopyFrom(pod.config.linux.security_context.apparmor)
    mount = pb.Mount(host_path=str(program), container_path=PROGRAM, readonly=True)
    return ContainerPlan(
        id=ContainerId(pod.id),
        pod=pod,
        config=pb.ContainerConfig(linux=pb.LinuxContainerConfig(security_context=security), mounts=[mount]),
        process=ProcessPlan(args=(PROGRAM, "-P"), env=(), cwd="/", user=_user(pod.ids)),
        image=None,
        rootfs=layout.rootfs(pod.id),
        bundle=layout.bundle(pod.id),
        log_path=None,
        stop_signal=15,
        infra=True,
        selinux=pod.selinux,
    )


def _user(ids: UserNamespace | None) -> User:
    """Nobody, as far as the pod has ids."""
    uid, gid = (_USER, _USER) if ids is None else (min(_USER, known.length - 1) for known in (ids.uids, ids.gids))
    return User(uid, gid, (gid,))


def _never_unconfined(asked: pb.SecurityProfile) -> pb.SecurityProfile:
    """The pod's own profile where it names one; a reaper of zombies is never unconfined."""
    if asked.profile_type == pb.SecurityProfile.Localhost:
        return asked
    return pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault)
