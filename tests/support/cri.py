"""A client of one CRI socket for tests and tools: the generated stubs, and the few calls that every story is made of.

Not a wrapper of the whole interface: what has no helper here is called on `runtime` and `images` with its own message.
Invariant: nothing is retried and no error is swallowed, so that what the daemon answers is what the caller sees.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import grpc

from cri_shim.pb import api_pb2 as pb
from cri_shim.pb import api_pb2_grpc as stubs

MESSAGE_LIMIT = 16 * 1024 * 1024
POLL = 0.01
"""Seconds between two looks at a container's state."""

_serial = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that runs. Its configuration goes along with each container, as the kubelet sends it."""

    id: str
    config: pb.PodSandboxConfig


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a CRI log file."""

    time: datetime
    stream: str
    partial: bool
    text: str


class Cri:
    """Both services of a CRI daemon over its unix socket."""

    def __init__(self, socket: Path, *, timeout: float = 60) -> None:
        limit = [("grpc.max_receive_message_length", MESSAGE_LIMIT), ("grpc.max_send_message_length", MESSAGE_LIMIT)]
        # One connection per client object: gRPC would share it between all clients of the same address.
        options = [*limit, ("grpc.use_local_subchannel_pool", 1), ("grpc.default_authority", "localhost")]
        self._channel = grpc.insecure_channel(f"unix:{socket}", options)
        self._timeout = timeout
        self.runtime = stubs.RuntimeServiceStub(self._channel)
        self.images = stubs.ImageServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def pull(self, image: str) -> str:
        """Returns the image id."""
        request = pb.PullImageRequest(image=pb.ImageSpec(image=image))
        return self.images.PullImage(request, timeout=self._timeout).image_ref

    def run_pod(self, config: pb.PodSandboxConfig, handler: str = "") -> Pod:
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return Pod(self.runtime.RunPodSandbox(request, timeout=self._timeout).pod_sandbox_id, config)

    def pod_status(self, pod: Pod | str) -> pb.PodSandboxStatus:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=_pod_id(pod))
        return self.runtime.PodSandboxStatus(request, timeout=self._timeout).status

    def stop_pod(self, pod: Pod | str) -> None:
        self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=_pod_id(pod)), timeout=self._timeout)

    def remove_pod(self, pod: Pod | str) -> None:
        self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=_pod_id(pod)), timeout=self._timeout)

    def pods(self) -> Sequence[pb.PodSandbox]:
        return self.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=self._timeout).items

    def remove_all_pods(self) -> None:
        """Stops and removes every pod, as the kubelet does it."""
        for pod in self.pods():
            self.stop_pod(pod.id)
            self.remove_pod(pod.id)

    def create(self, pod: Pod, config: pb.ContainerConfig) -> str:
        """Returns the container id."""
        request = pb.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
        return self.runtime.CreateContainer(request, timeout=self._timeout).container_id

    def start(self, container: str) -> None:
        self.runtime.StartContainer(pb.StartContainerRequest(container_id=container), timeout=self._timeout)

    def run(self, pod: Pod, config: pb.ContainerConfig) -> str:
        """Creates and starts a container. Returns its id."""
        container = self.create(pod, config)
        self.start(container)
        return container

    def stop(self, container: str, grace: int = 0) -> None:
        """`grace` in seconds, as in StopContainerRequest.timeout."""
        request = pb.StopContainerRequest(container_id=container, timeout=grace)
        self.runtime.StopContainer(request, timeout=self._timeout + grace)

    def remove(self, container: str) -> None:
        self.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container), timeout=self._timeout)

    def status(self, container: str) -> pb.ContainerStatus:
        request = pb.ContainerStatusRequest(container_id=container)
        return self.runtime.ContainerStatus(request, timeout=self._timeout).status

    def containers(self) -> Sequence[pb.Container]:
        return self.runtime.ListContainers(pb.ListContainersRequest(), timeout=self._timeout).containers

    def wait_exit(self, container: str, within: float = 60) -> pb.ContainerStatus:
        """Returns the status of the exited container; raises TimeoutError after `within` seconds."""
        deadline = time.monotonic() + within
        while (status := self.status(container)).state != pb.CONTAINER_EXITED:
            if time.monotonic() > deadline:
                state = pb.ContainerState.Name(status.state)
                raise TimeoutError(f"container {container[:13]} is {state} after {within} s")
            time.sleep(POLL)
        return status

    def exec(self, container: str, argv: Sequence[str], within: int = 60) -> pb.ExecSyncResponse:
        """Runs a further process; `within` in seconds, as in ExecSyncRequest.timeout."""
        request = pb.ExecSyncRequest(container_id=container, cmd=argv, timeout=within)
        return self.runtime.ExecSync(request, timeout=self._timeout + within)

    def log(self, container: str) -> list[LogLine]:
        """The lines that the container has logged so far, as its status says where."""
        return read_log(Path(self.status(container).log_path))

    def wait_log(self, container: str, text: str, within: float = 60) -> list[LogLine]:
        """Returns the log once a line of it contains `text`; raises TimeoutError after `within` seconds."""
        deadline = time.monotonic() + within
        while True:
            lines = self.log(container)
            if any(text in line.text for line in lines):
                return lines
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {text!r} in the log after {within} s: {[line.text for line in lines]}")
            time.sleep(POLL)


def pod_config(
    name: str = "",
    *,
    network: pb.NamespaceMode.ValueType = pb.POD,
    pid: pb.NamespaceMode.ValueType = pb.CONTAINER,
    cgroup_parent: str = "",
    log_directory: Path | None = None,
    annotations: Mapping[str, str] | None = None,
) -> pb.PodSandboxConfig:
    """A pod as the kubelet describes one; without a name it gets one of its own."""
    name = name or f"pod-{next(_serial)}"
    host = network == pb.NODE
    return pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name=name, namespace="default", uid=f"uid-{name}"),
        hostname="" if host else name,
        log_directory=str(log_directory or ""),
        annotations=annotations or {},
        labels={"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "default"},
        linux=pb.LinuxPodSandboxConfig(
            cgroup_parent=cgroup_parent,
            security_context=pb.LinuxSandboxSecurityContext(
                namespace_options=pb.NamespaceOption(network=network, pid=pid, ipc=pb.POD)
            ),
        ),
    )


def container_config(
    image: str,
    *command: str,
    name: str = "main",
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    pid: pb.NamespaceMode.ValueType = pb.CONTAINER,
) -> pb.ContainerConfig:
    """A container as the kubelet describes one, logging to `<name>/0.log` below the pod's log directory.

    The network and IPC namespaces are the pod's. Fields that are missing here are set on the message by the caller.
    """
    return pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=name),
        image=pb.ImageSpec(image=image, user_specified_image=image),
        command=command,
        args=args,
        envs=[pb.KeyValue(key=key, value=value.encode()) for key, value in (env or {}).items()],
        log_path=f"{name}/0.log",
        labels={"io.kubernetes.container.name": name, **(labels or {})},
        linux=pb.LinuxContainerConfig(
            security_context=pb.LinuxContainerSecurityContext(namespace_options=pb.NamespaceOption(pid=pid))
        ),
    )


def read_log(path: Path) -> list[LogLine]:
    """Parses a CRI log file; a file that is not there yet has no lines."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [_parse_log_line(line) for line in lines]


def whole_lines(log: Sequence[LogLine]) -> list[str]:
    """The texts of a log with the pieces put together: a line comes in pieces when it was written in pieces."""
    lines: list[str] = []
    pieces: dict[str, str] = {}
    for entry in log:
        text = pieces.pop(entry.stream, "") + entry.text
        if entry.partial:
            pieces[entry.stream] = text
        else:
            lines.append(text)
    return [*lines, *pieces.values()]


def fault(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """What a failed call of a stub says: its status code and its message."""
    call = cast("grpc.Call", error)
    return call.code(), call.details() or ""


def _pod_id(pod: Pod | str) -> str:
    return pod if isinstance(pod, str) else pod.id


def _parse_log_line(line: str) -> LogLine:
    stamp, stream, tag, text = line.split(" ", 3)
    # Nanoseconds: more digits than datetime knows.
    seconds, _, fraction = stamp.partition(".")
    digits = fraction.rstrip("Z").partition("+")[0]
    moment = datetime.fromisoformat(f"{seconds}.{digits[:6]:0<6}+00:00")
    return LogLine(moment, stream, tag == "P", text)
