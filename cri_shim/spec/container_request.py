"""A container from its request: names, paths and facts that do not depend on the handler.

Not the process (`cri_shim.spec.process`) and not what a handler refuses: each handler checks the fields that it cannot
honour. Invariant: what these functions refuse, no handler could honour.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from cri_shim.model.container import ContainerName, ContainerRecord
from cri_shim.model.entry import EntryKind, EntryPoint, is_named_wasm
from cri_shim.model.errors import InvalidArgument
from cri_shim.model.handler import ContainerPlan, PodContext, ProcessPlan
from cri_shim.model.ids import PodId
from cri_shim.model.image import ImageRecord
from cri_shim.model.layout import Layout
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import resources
from cri_shim.spec.dispatch import OCI_HANDLER, Decision, HandlerRules, Subject
from cri_shim.spec.paths import check_length, check_path
from cri_shim.spec.pod import check_name, shares_pid
from cri_shim.spec.process import DEFAULT_PATH, process_args

_SHOWN = 200
"""Characters of a path that an error shows."""
_OF_KERNEL = ("/proc/", "/sys/", "/dev/")
_OF_POD = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")


def container_name(config: pb.ContainerConfig, pod_id: PodId) -> ContainerName:
    """The name that a container reserves within its pod. Raises InvalidArgument for bad metadata."""
    check_name("metadata.name", config.metadata.name)
    return ContainerName(f"{config.metadata.name}_{config.metadata.attempt}_{pod_id}")


def check(config: pb.ContainerConfig, pod: pb.PodSandboxConfig) -> None:
    """Refuse what is wrong whoever runs the container."""
    if config.HasField("windows"):
        msg = "windows: this node runs Linux"
        raise InvalidArgument(msg)
    if config.linux.security_context.privileged and not pod.linux.security_context.privileged:
        msg = "linux.security_context.privileged: the pod sandbox is not privileged"
        raise InvalidArgument(msg, hint="set privileged in the pod's security context too")
    options = config.linux.security_context.namespace_options
    if options.pid == pb.POD and config.linux.security_context.HasField("namespace_options") and not shares_pid(pod):
        msg = "linux.security_context.namespace_options.pid: POD, but the pod sandbox shares no PID namespace"
        raise InvalidArgument(msg, hint="set pid: POD in the pod's namespace options too")
    if options.pid == pb.TARGET and not options.target_id:
        msg = "linux.security_context.namespace_options.target_id is empty, but pid is TARGET"
        raise InvalidArgument(msg)
    _check_shared(options, pod.linux.security_context.namespace_options)
    resources.check(config.linux.resources)
    for mount in config.mounts:
        _check_mount(mount)
    for device in config.devices:
        check_path("devices: host_path", device.host_path)
        check_path("devices: container_path", device.container_path or device.host_path)


def _check_shared(own: pb.NamespaceOption, of_pod: pb.NamespaceOption) -> None:
    """POD is also what a request has that says nothing."""
    for field, asked, shared in (("network", own.network, of_pod.network), ("ipc", own.ipc, of_pod.ipc)):
        if asked not in {pb.NamespaceMode.POD, shared}:
            modes = f"{pb.NamespaceMode.Name(asked)}, but the pod sandbox has {pb.NamespaceMode.Name(shared)}"
            msg = f"linux.security_context.namespace_options.{field}: {modes}"
            raise InvalidArgument(msg, hint="the containers of a pod share it: say the same, or leave it out")


def log_path(log_directory: str, relative: str) -> str:
    """The absolute path of the log; empty when either part is. Raises InvalidArgument when it leaves the directory."""
    if not log_directory or not relative:
        return ""
    path = posixpath.normpath(posixpath.join(log_directory, relative))
    if posixpath.isabs(relative) or not path.startswith(posixpath.normpath(log_directory).rstrip("/") + "/"):
        msg = f"log_path {relative!r} is not below the pod's log_directory"
        raise InvalidArgument(msg)
    check_length("log_path", path)
    return path


def entry_point(word: str, config: pb.ContainerConfig, image: ImageRecord) -> EntryPoint:
    """Where to look for the file that would be executed. The request's PATH wins over the image's."""
    search = DEFAULT_PATH
    for variable in image.config.env:
        name, _, value = variable.partition("=")
        search = value if name == "PATH" else search
    for pair in config.envs:
        search = pair.value.decode(errors="replace") if pair.key == "PATH" else search
    return EntryPoint(word, posixpath.join("/", config.working_dir or image.config.working_dir), search)


def subject(config: pb.ContainerConfig, pod: pb.PodSandboxConfig, image: ImageRecord, entry: EntryKind) -> Subject:
    """The facts that dispatch decides by."""
    return Subject(
        name=config.metadata.name,
        container_annotations=config.annotations,
        pod_annotations=pod.annotations,
        image_annotations={**image.config.labels, **image.annotations},
        image_wasm=image.wasm is not None,
        platform_wasm=image.platform.is_wasm,
        entry=entry,
        named_wasm=is_named_wasm(process_args(config, image)[0]),
    )


def passed_annotations(
    config: pb.ContainerConfig, pod: pb.PodSandboxConfig, rules: HandlerRules, decision: Decision
) -> Mapping[str, str]:
    """The client's annotations that reach the runtime: those that the handler's `allowed_annotations` name by glob."""
    result = {
        key: value
        for source in (pod.annotations, config.annotations)
        for key, value in source.items()
        if any(fnmatchcase(key, pattern) for pattern in rules.allowed_annotations)
    }
    if decision.wasm and decision.handler == rules.name:
        # The runtime's own engine is chosen by this word, whatever made us decide for Wasm.
        result[OCI_HANDLER] = "wasm"
    elif result.get(OCI_HANDLER) == "wasm":
        # A hint of the pod's, on a container that is none.
        del result[OCI_HANDLER]
    return result


def current_resources(record: ContainerRecord) -> pb.LinuxContainerResources:
    """The limits that hold: as last updated, else as asked for at first."""
    if record.resources is not None:
        return pb.LinuxContainerResources.FromString(record.resources)
    return pb.ContainerConfig.FromString(record.config).linux.resources


def adopted_plan(record: ContainerRecord, pod: PodContext, image: ImageRecord | None, layout: Layout) -> ContainerPlan:
    """The plan of a container that exists, from its record: its process is on disk with the handler, not here."""
    config = pb.ContainerConfig.FromString(record.config)
    return ContainerPlan(
        id=record.id,
        pod=pod,
        config=config,
        process=ProcessPlan(args=(), env=(), cwd="/", user=record.user, tty=config.tty),
        image=image,
        rootfs=layout.rootfs(record.id) if record.layers else None,
        bundle=layout.bundle(record.id),
        log_path=Path(record.log_path) if record.log_path else None,
        stop_signal=record.stop_signal,
    )


def without_taken(places: Iterable[str], taken: Collection[str]) -> tuple[str, ...]:
    """Of the VOLUMEs of an image those that get a directory; a mount of the request wins.

    An image must not put a directory of its own where the kernel's file systems and the pod's files belong.
    """
    return tuple(
        place for place in places if place not in {"/", *taken, *_OF_POD} and not f"{place}/".startswith(_OF_KERNEL)
    )


def with_directories(config: pb.ContainerConfig, directories: Mapping[str, Path]) -> pb.ContainerConfig:
    """The request with writable mounts of these directories, by their places in the container, before its own."""
    extended = pb.ContainerConfig()
    extended.CopyFrom(config)
    del extended.mounts[:]
    extended.mounts.extend(
        pb.Mount(container_path=place, host_path=str(directory), selinux_relabel=True)
        for place, directory in directories.items()
    )
    extended.mounts.extend(config.mounts)
    return extended


def _check_mount(mount: pb.Mount) -> None:
    check_path("mounts: container_path", mount.container_path)
    target = mount.container_path[:_SHOWN]
    if mount.HasField("image"):
        _check_image_volume(mount, target)
    elif mount.image_sub_path:
        msg = f"mounts: image_sub_path of {target}: needs image"
        raise InvalidArgument(msg)
    elif mount.host_path:
        check_path("mounts: host_path", mount.host_path)
    else:
        msg = f"mounts: {target!r} has neither host_path nor image"
        raise InvalidArgument(msg)


def _check_image_volume(mount: pb.Mount, target: str) -> None:
    """What the CRI says of `Mount.image`: read-only, instead of a host path, and a path inside of the image."""
    sub_path = mount.image_sub_path
    wrong = {
        f"image.image of {target} is empty": not mount.image.image,
        f"host_path and image of {target} exclude each other": bool(mount.host_path),
        f"readonly of {target}: an image volume must be read-only": not mount.readonly,
        f"propagation of {target}: nothing can be mounted into an image volume": mount.propagation
        == pb.MountPropagation.PROPAGATION_BIDIRECTIONAL,
        f"image_sub_path of {target}: {sub_path[:_SHOWN]!r} is not a relative path without '..'": (
            sub_path.startswith("/") or ".." in sub_path.split("/") or "\0" in sub_path
        ),
    }
    for why, is_wrong in wrong.items():
        if is_wrong:
            msg = f"mounts: {why}"
            raise InvalidArgument(msg)
    check_length("mounts: image_sub_path", sub_path)
