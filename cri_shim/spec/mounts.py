"""The mounts of a container: defaults, the pod's files, and those of the request.

Not the mounting, and not the making of missing sources. Invariant: parents come before children, and a mount of the
request replaces a default at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.handler import ContainerPlan, PodContext
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.facts import ContainerFacts, Json, MountSource, Propagation
from cri_shim.spec.namespaces import id_mappings
from cri_shim.spec.paths import rooted

_SHOWN = 100
_TTY = 5
"""The group of terminals, by convention."""
_OF_KERNEL = ("nosuid", "noexec", "nodev")
_ACCESS_TIMES = ("noatime", "relatime", "strictatime")
"""Of these a mount has one."""
_MOUNT_OPTIONS = ("noexec", "nosuid", "nodev", "nodiratime", *_ACCESS_TIMES)
"""What `Mount.mount_options` may name: what takes rights away, or none. `ro` has a field of its own."""
_PROPAGATION_OPTION = {
    pb.MountPropagation.PROPAGATION_PRIVATE: "rprivate",
    pb.MountPropagation.PROPAGATION_HOST_TO_CONTAINER: "rslave",
    pb.MountPropagation.PROPAGATION_BIDIRECTIONAL: "rshared",
}


def mounts(plan: ContainerPlan, found: ContainerFacts) -> list[Json]:
    """`mounts` (OCI runtime-spec, config) in the order in which they are made."""
    asked = [_asked(mount, found, plan.pod) for mount in plan.config.mounts]
    own = {mount["destination"] for mount in asked}
    placed = [mount for mount in _of_pod(plan) if mount["destination"] not in own] + asked
    hidden = {mount["destination"] for mount in placed}
    defaults = [m for m in _defaults(plan) if not _is_hidden(m["destination"], hidden)]
    return [*defaults, *sorted(placed, key=_depth)]


def rootfs_propagation(mounts_asked: Sequence[pb.Mount]) -> str:
    """`linux.rootfsPropagation`: as open as the most open mount needs it, empty for the runtime's default."""
    modes = {mount.propagation for mount in mounts_asked}
    if pb.MountPropagation.PROPAGATION_BIDIRECTIONAL in modes:
        return "rshared"
    return "rslave" if pb.MountPropagation.PROPAGATION_HOST_TO_CONTAINER in modes else ""


def _defaults(plan: ContainerPlan) -> list[Json]:
    minimal = [
        _kernel_fs("/proc", "proc", _OF_KERNEL),
        _kernel_fs("/dev", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ]
    if plan.infra:
        return minimal
    access = "rw" if plan.config.linux.security_context.privileged else "ro"
    terminals = (f"gid={_TTY}",) if plan.pod.ids is None or plan.pod.ids.gids.holds(_TTY) else ()
    return [
        *minimal,
        _kernel_fs("/dev/pts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *terminals)),
        _kernel_fs("/dev/mqueue", "mqueue", _OF_KERNEL),
        _sysfs(plan.pod, access),
        _kernel_fs("/sys/fs/cgroup", "cgroup", (*_OF_KERNEL, "relatime", access)),
    ]


def _sysfs(pod: PodContext, access: str) -> Json:
    """A sysfs shows a network namespace, and only who owns that can mount one; else there is the node's to look at."""
    if pod.ids is not None and pod.net is None:
        return bind("/sys", "/sys", ("rbind", "rslave", *_OF_KERNEL, "rro"))
    return _kernel_fs("/sys", "sysfs", (*_OF_KERNEL, access))


def _of_pod(plan: ContainerPlan) -> list[Json]:
    if plan.infra:
        return []
    access = "ro" if plan.config.linux.security_context.readonly_rootfs else "rw"
    pod = plan.pod
    # Repeated from the mount itself: crun drops from a bind what its options do not name.
    shm = _OF_KERNEL if pod.ipc is not None else ("nosuid", "nodev")
    return [
        bind(str(pod.shm), "/dev/shm", ("rbind", "rprivate", *shm, "rw")),  # noqa: S108  the pod's own
        bind(str(pod.hostname_file), "/etc/hostname", ("rbind", "rprivate", access)),
        bind(str(pod.hosts), "/etc/hosts", ("rbind", "rprivate", access)),
        bind(str(pod.resolv_conf), "/etc/resolv.conf", ("rbind", "rprivate", access)),
    ]


def _asked(mount: pb.Mount, found: ContainerFacts, pod: PodContext) -> Json:
    target = _target(mount)
    source = found.sources.get(mount.host_path)
    if source is None:
        msg = f"mounts: host_path {mount.host_path!r} of {target} does not exist"
        raise FailedPrecondition(msg)
    if mount.propagation not in _PROPAGATION_OPTION:
        msg = f"mounts: propagation {mount.propagation} of {target} is not a value of the CRI's enum"
        raise InvalidArgument(msg)
    _check_propagation(mount, source, pod)
    access = "rw"
    if mount.readonly:
        access = "rro" if mount.recursive_read_only else "ro"
    options = dict.fromkeys((*source.restrictions, *mount_options(mount)))
    made = bind(source.path, target, ("rbind", _PROPAGATION_OPTION[mount.propagation], *options, access))
    return {**made, **_id_mappings(mount, pod)}


def _id_mappings(mount: pb.Mount, pod: PodContext) -> Json:
    """Whose the files of an idmapped mount are (OCI runtime-spec, config, `mounts`); nothing for any other mount."""
    if not mount.uidMappings:
        return {}
    mapped = {
        field: [{"containerID": m.container_id, "hostID": m.host_id, "size": m.length} for m in mappings]
        for field, mappings in (("uidMappings", mount.uidMappings), ("gidMappings", mount.gidMappings))
    }
    if not mount.HasField("image"):
        return mapped
    if mapped != id_mappings(pod.ids):
        msg = f"mounts: uidMappings and gidMappings of {mount.container_path}: the files of an image have the pod's ids"
        raise InvalidArgument(msg, hint="give those of the pod's userns_options, or none")
    return {}


def mount_options(mount: pb.Mount) -> Sequence[str]:
    """The request's further options of the mount. As with `readonly`, those below keep their own. InvalidArgument."""
    for option in mount.mount_options:
        if option not in _MOUNT_OPTIONS:
            msg = f"mounts: mount_options {option[:_SHOWN]!r} of {mount.container_path} is not supported"
            hint = "use readonly" if option in {"ro", "rw"} else f"there are {', '.join(_MOUNT_OPTIONS)}"
            raise InvalidArgument(msg, hint=hint)
    times = sorted({option for option in mount.mount_options if option in _ACCESS_TIMES})
    if len(times) > 1:
        msg = f"mounts: mount_options {' and '.join(times)} of {mount.container_path} exclude each other"
        raise InvalidArgument(msg)
    return mount.mount_options


def _target(mount: pb.Mount) -> str:
    given = mount.container_path
    target = rooted(given)
    if not given.startswith("/") or "\0" in given or target == "/":
        msg = f"mounts: container_path {given!r} is not an absolute path below /"
        raise InvalidArgument(msg)
    return target


def _check_propagation(mount: pb.Mount, source: MountSource, pod: PodContext) -> None:
    """Where nothing would be passed on, the request could not be kept (contract: default mounts)."""
    if pod.ids is not None and mount.propagation == pb.MountPropagation.PROPAGATION_BIDIRECTIONAL:
        msg = f"mounts: PROPAGATION_BIDIRECTIONAL of {mount.container_path}: no mount leaves a user namespace"
        raise InvalidArgument(msg, hint="the pod has a user namespace of its own")
    enough = {
        pb.MountPropagation.PROPAGATION_PRIVATE: set(Propagation),
        pb.MountPropagation.PROPAGATION_HOST_TO_CONTAINER: {Propagation.SHARED, Propagation.SLAVE},
        pb.MountPropagation.PROPAGATION_BIDIRECTIONAL: {Propagation.SHARED},
    }[mount.propagation]
    if source.propagation not in enough:
        wanted = pb.MountPropagation.Name(mount.propagation)
        msg = f"mounts: {wanted} of {mount.container_path}: {source.path} is on a {source.propagation.value} mount"
        raise FailedPrecondition(msg, hint=f"make that mount of the host shared: mount --make-rshared {source.path}")


def bind(source: str, target: str, options: Sequence[str]) -> Json:
    """A bind mount."""
    return {"destination": target, "type": "bind", "source": source, "options": list(options)}


def _kernel_fs(target: str, kind: str, options: Sequence[str]) -> Json:
    return {"destination": target, "type": kind, "source": kind, "options": list(options)}


def _is_hidden(target: str, placed: set[str]) -> bool:
    return target in placed or ("/dev" in placed and target.startswith("/dev/"))


def _depth(mount: Json) -> int:
    target: str = mount["destination"]
    return target.count("/")
