"""A kind of container under measurement, and pods on the host's network that hold one each.

Only the CRI is used, so that any daemon can be the target. Invariant: pods that were made here are gone at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from cri_shim.pb import api_pb2 as pb
from scripts.bench import memory
from tests.support.cri import Cri, Pod, container_config, pod_config

FIRST_LINE_SECONDS = 60.0
_AT_ONCE = 8
_serial = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Kind:
    """What is run, on which daemon."""

    title: str
    socket: Path
    pid: int
    """The daemon's process."""
    handler: str
    image: str
    command: tuple[str, ...]
    """Empty = the image's own."""
    logs: Path
    """Where the logs of its pods are."""
    annotations: tuple[tuple[str, str], ...] = ()
    """Of its pods."""
    peer: Kind | None = None
    """What its figures are compared with."""

    def client(self) -> Cri:
        return Cri(self.socket, timeout=300)

    def pull(self, cri: Cri) -> None:
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=self.image))
        if not cri.images.ImageStatus(request, timeout=60).image.id:
            cri.pull(self.image)

    def pod(self, cri: Cri) -> Pod:
        name = f"bench-{os.getpid()}-{next(_serial)}"
        config = pod_config(name, network=pb.NODE, log_directory=self.logs / name)
        config.annotations.update(dict(self.annotations))
        return cri.run_pod(config, self.handler)

    def container(self, name: str = "main") -> pb.ContainerConfig:
        return container_config(self.image, *self.command, name=name)

    def log_of(self, pod: Pod, name: str = "main") -> Path:
        return Path(pod.config.log_directory) / name / "0.log"


def remove(cri: Cri, pod: Pod) -> None:
    cri.stop_pod(pod)
    # containerd before 2.0 takes a removed pod for an error.
    with contextlib.suppress(grpc.RpcError):
        cri.remove_pod(pod)


@contextmanager
def running(kind: Kind, cri: Cri, number: int) -> Iterator[list[tuple[Pod, str]]]:
    """So many pods, whose containers have printed a line: pod and container."""
    pods: list[tuple[Pod, str]] = []

    def begin(_number: int) -> None:
        pod = kind.pod(cri)
        container = cri.run(pod, kind.container())
        pods.append((pod, container))
        cri.wait_log(container, "", FIRST_LINE_SECONDS)

    with ThreadPoolExecutor(_AT_ONCE) as clients:
        try:
            list(clients.map(begin, range(number)))
            yield pods
        finally:
            list(clients.map(lambda pair: remove(cri, pair[0]), pods))


def growth_per_container(kind: Kind, number: int) -> float:
    """What the daemon, its helpers and the containers grow by for each, in KiB of PSS."""
    with kind.client() as cri:
        kind.pull(cri)
        with running(kind, cri, 1):
            pass  # what a daemon loads once is no cost of the containers that follow
        before = memory.pss(memory.Processes.now().tree([kind.pid]))
        with running(kind, cri, number) as pods:
            processes = memory.Processes.now()
            # containerd's shims are nobody's children, but have the pod's id in their arguments.
            shims = processes.naming([pod.id for pod, _ in pods])
            return (memory.pss(processes.tree([kind.pid, *shims])) - before) * memory.KIB_PER_MIB / number
