"""The files, mounts and namespaces that a pod's containers share: made in one go, removed by id.

Not the namespaces of a pod with a user namespace (`cri_shim.adapters.user_namespaces`). Blocking functions, for
threads. Invariant: `remove` succeeds on a whole pod, on half of one and on none.
"""

from __future__ import annotations

import os
from pathlib import Path

from cri_shim.adapters import image_volumes, rootfs, selinux_labels
from cri_shim.kernel import fs, mounts, namespaces, selinux
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.handler import PodContext
from cri_shim.model.ids import PodId
from cri_shim.model.layout import Layout
from cri_shim.model.selinux import Label
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.namespaces import user_namespace
from cri_shim.spec.pod import SandboxPlan, host_network, shm_bytes
from cri_shim.spec.pod import namespaces as namespaces_of

_FILE_MODE = 0o644
_FILES = ("resolv.conf", "hosts", "hostname")
_PIECE = 64 * 1024
"""Bytes of one read."""


def make(layout: Layout, pod_id: PodId, plan: SandboxPlan, label: Label | None, *, root: bool) -> None:
    """Make everything that `plan` says, under an SELinux label. On error nothing is left.

    Raises OSError or CriShimError, InvalidArgument for a label that the policy does not know.
    """
    if label is not None:
        selinux_labels.check(label)
    directory = layout.pod(pod_id)
    try:
        directory.mkdir(mode=0o755, parents=True)
        _write_files(directory, plan)
        if label is not None:
            selinux.relabel(directory, label.mount)
        if plan.log_directory:
            _make_log_directory(Path(plan.log_directory))
        if root:
            _make_namespaces(layout, pod_id, plan, label.mount if label else "")
    except BaseException:
        remove(layout, pod_id)
        raise


def remove(layout: Layout, pod_id: PodId) -> None:
    """Release the namespaces, unmount and delete. Gone = success."""
    directory = layout.pod(pod_id)
    for name in _FILES:
        (directory / name).unlink(missing_ok=True)
    try:
        directory.rmdir()  # a stopped pod of modules has nothing else
    except OSError:
        release(layout, pod_id)
        fs.remove_tree(directory)


def release(layout: Layout, pod_id: PodId) -> None:
    """Let go of kernel objects: namespaces, /dev/shm and image volumes. The files stay for status and logs."""
    directory = layout.pod(pod_id)
    if not directory.exists():
        return
    namespaces.unpin(directory / "ns")
    mounts.unmount(directory / "shm")
    image_volumes.release(layout, pod_id)


def make_ipc(pod: PodContext) -> None:
    """The IPC namespace and /dev/shm of a pod that was made without: `SandboxPlan.ipc_later`.

    What is there already stays as it is. What a failure leaves goes with the pod.
    """
    if pod.ipc is not None and not mounts.is_mount_point(pod.ipc):
        pod.ipc.parent.mkdir(mode=0o700, exist_ok=True)
        namespaces.pin_namespaces(pod.ipc.parent, net=False, ipc=True, uts=False, hostname="", sysctls={})
    if not mounts.is_mount_point(pod.shm):
        _mount_shm(
            pod.shm,
            shm_bytes(pod.config.annotations) if pod.ipc is not None else None,
            (0, 0),
            pod.selinux.mount if pod.selinux is not None else "",
        )


def missing(layout: Layout, pod_id: PodId, config: pb.PodSandboxConfig, *, needs_ipc: bool) -> str:
    """Which of a pod's kernel objects is gone, in words; empty when all are there."""
    wanted = {
        "user": user_namespace(namespaces_of(config)) is not None,
        "net": not host_network(config),
        "ipc": needs_ipc and namespaces_of(config).ipc != pb.NODE,
    }
    for kind, needed in wanted.items():
        if needed and not mounts.is_mount_point(layout.namespace(pod_id, kind)):
            return f"its {kind} namespace is gone"
    return ""


def make_infra_root(layout: Layout, pod: PodContext) -> None:
    """The bundle and the empty root file system of the pod's own container."""
    rootfs.make_bundle(layout, pod.id, pod.ids)
    root = layout.rootfs(pod.id)
    root.mkdir(mode=0o755)
    if pod.selinux is not None:
        selinux.relabel(root, pod.selinux.mount)
    if pod.ids is not None:  # the runtime makes the places of its mounts as root of the pod
        os.chown(root, pod.ids.uids.first, pod.ids.gids.first)


def pin_pid_namespace(layout: Layout, pod_id: PodId, pid: int) -> None:
    """Keep the PID namespace of a process as the pod's shared one."""
    target = layout.namespace(pod_id, "pid")
    target.parent.mkdir(mode=0o700, exist_ok=True)
    target.touch(mode=0o600)
    mounts.bind(Path(f"/proc/{pid}/ns/pid"), target)


def _write_files(directory: Path, plan: SandboxPlan) -> None:
    resolv = plan.resolv_conf if plan.resolv_conf is not None else _host_file("/etc/resolv.conf")
    contents = resolv, _host_file("/etc/hosts"), f"{plan.hostname}\n".encode()
    for name, data in zip(_FILES, contents, strict=True):
        fd = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
            os.fchmod(fd, _FILE_MODE)
            if plan.user is not None:
                os.fchown(fd, *_owner(plan))
        finally:
            os.close(fd)


def _owner(plan: SandboxPlan) -> tuple[int, int]:
    """The pod's root."""
    return (plan.user.uids.first, plan.user.gids.first) if plan.user else (0, 0)


def _host_file(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:  # a file object would ask the kernel for more than the bytes
        return b"".join(iter(lambda: os.read(fd, _PIECE), b""))
    finally:
        os.close(fd)


def _make_log_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        msg = f"log_directory {path}: {os.strerror(error.errno or 0)}"
        raise FailedPrecondition(msg) from error


def _make_namespaces(layout: Layout, pod_id: PodId, plan: SandboxPlan, mount_label: str) -> None:
    directory = layout.pod(pod_id)
    ipc = plan.ipc and not plan.ipc_later
    if plan.net or ipc or plan.uts:
        (directory / "ns").mkdir(mode=0o700)
        if plan.user is None:
            namespaces.pin_namespaces(
                directory / "ns",
                net=plan.net,
                ipc=ipc,
                uts=plan.uts,
                hostname=plan.hostname,
                sysctls=plan.sysctls,
            )
    if not plan.ipc_later:
        _mount_shm(directory / "shm", plan.shm_bytes if plan.ipc else None, _owner(plan), mount_label)


def _mount_shm(target: Path, size: int | None, owner: tuple[int, int], label: str) -> None:
    """`size` None: the node's."""
    target.mkdir(mode=0o755, exist_ok=True)
    if size is None:
        mounts.bind(Path("/dev/shm"), target)  # noqa: S108 (the pod asked for the node's IPC)
    else:
        mounts.tmpfs(target, size=size, mode=0o1777, uid=owner[0], gid=owner[1], label=label)
