"""One CRI daemon under measurement: what is asked of it, and one round of it.

Only the CRI is used, so that any daemon can be the target. Invariant: a round removes all pods that it made.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc

from cri_shim.pb import api_pb2 as pb
from scripts.bench import memory
from tests.support.cri import Cri, Pod, container_config, fault, pod_config

T = TypeVar("T")

IDLE = "daemon, no pods"
LISTED = 100
"""Containers that exist while ListContainers is measured."""

_serial = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Target:
    """A daemon and the pod that is run on it."""

    name: str
    socket: Path
    handler: str
    image: str
    command: tuple[str, ...]
    network: pb.NamespaceMode.ValueType
    pid: int
    """The daemon's process, for its memory; 0 = not measured."""


@dataclass(frozen=True, slots=True)
class Work:
    """How much one round does."""

    iterations: int
    pods: int
    """Pods that run at once while memory is measured; 0 = memory is not measured."""
    pull: str
    """An image that is removed and pulled; empty = not measured."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one round gave: milliseconds by call, and MiB of PSS by what they are for."""

    load: float
    latency: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    memory: dict[str, float] = field(default_factory=dict)


def run_round(target: Target, work: Work) -> Round:
    """Measures everything once. What the daemon does not implement is left out of the result."""
    result = Round(load=os.getloadavg()[0])
    with Cri(target.socket, timeout=300) as cri:
        session = _Session(target, cri, result)
        session.ensure_image()
        session.lifecycle(measured=False)
        if work.pods and target.pid:
            # After the first pod: what a daemon loads once is no cost of the pods that follow.
            result.memory[IDLE] = memory.pss(memory.resident(target.pid, ()))
        for _ in range(work.iterations):
            session.lifecycle()
        session.listing(work.iterations)
        if work.pull:
            session.pulling(work.pull)
        if work.pods:
            session.memory(work.pods)
    return result


class _Session:
    """One round on one connection."""

    def __init__(self, target: Target, cri: Cri, result: Round) -> None:
        self._target = target
        self._cri = cri
        self._result = result

    def ensure_image(self) -> None:
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=self._target.image))
        if not self._cri.images.ImageStatus(request, timeout=60).image.id:
            self._cri.pull(self._target.image)

    def lifecycle(self, *, measured: bool = True) -> None:
        """One pod with one container, from nothing to nothing."""
        timed = self._timed if measured else _untimed
        cri = self._cri
        with self._new_pod(timed) as pod:
            container = timed("CreateContainer", lambda: cri.create(pod, self._container()))
            timed("StartContainer", lambda: cri.start(container))
            if self._can_exec(container):
                timed("ExecSync true", lambda: cri.exec(container, ["true"]))
            timed("StopContainer", lambda: cri.stop(container))
            timed("RemoveContainer", lambda: cri.remove(container))
            timed("StopPodSandbox", lambda: cri.stop_pod(pod))
            timed("RemovePodSandbox", lambda: cri.remove_pod(pod))
        if measured:
            latest = self._result.latency
            steps = "RunPodSandbox", "CreateContainer", "StartContainer"
            latest["Run + Create + Start"].append(sum(latest[step][-1] for step in steps))

    def listing(self, iterations: int) -> None:
        with self._new_pod(_untimed) as pod:
            for number in range(LISTED):
                self._cri.create(pod, self._container(f"main-{number}"))
            for _ in range(iterations):
                self._timed(f"ListContainers of {LISTED}", self._cri.containers)

    def pulling(self, image: str) -> None:
        self._cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=image)), timeout=60)
        self._timed("PullImage", lambda: self._cri.pull(image))

    def memory(self, pods: int) -> None:
        """PSS of the daemon and of its helpers while `pods` pods run."""
        ids: list[str] = []
        payload: list[int] = []
        try:
            for _ in range(pods):
                pod = self._cri.run_pod(self._pod(), self._target.handler)
                ids.append(pod.id)
                container = self._cri.run(pod, self._container())
                ids.append(container)
                payload += self._process_of(container)
            figures = self._result.memory
            if self._target.pid:
                figures[f"daemon, {pods} pods"] = memory.pss(memory.resident(self._target.pid, ids))
                growth = figures[f"daemon, {pods} pods"] - figures[IDLE]
                figures["daemon, growth per pod"] = growth / pods
            figures["helpers per pod"] = memory.pss(memory.helpers(ids, payload)) / pods
        finally:
            for pod_id in ids[::2]:
                self._cri.stop_pod(pod_id)
                self._cri.remove_pod(pod_id)

    @contextmanager
    def _new_pod(self, timed: Callable[[str, Callable[[], Pod]], Pod]) -> Iterator[Pod]:
        config = self._pod()
        pod = timed("RunPodSandbox", lambda: self._cri.run_pod(config, self._target.handler))
        try:
            yield pod
        finally:
            # containerd before 2.0 takes a removed pod for an error.
            if any(listed.id == pod.id for listed in self._cri.pods()):
                self._cri.stop_pod(pod)
                self._cri.remove_pod(pod)

    def _pod(self) -> pb.PodSandboxConfig:
        return pod_config(f"bench-{os.getpid()}-{next(_serial)}", network=self._target.network)

    def _container(self, name: str = "main") -> pb.ContainerConfig:
        return container_config(self._target.image, *self._target.command, name=name)

    def _can_exec(self, container: str) -> bool:
        try:
            self._cri.exec(container, ["true"])
        except grpc.RpcError as error:
            # No exec at all, or an image without this program: one module.
            if fault(error)[0] in {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND}:
                return False
            raise
        return True

    def _process_of(self, container: str) -> list[int]:
        """The container's first process as the verbose status tells it; none for one that has no process."""
        request = pb.ContainerStatusRequest(container_id=container, verbose=True)
        info = self._cri.runtime.ContainerStatus(request, timeout=60).info
        pid = json.loads(info.get("info", "{}")).get("pid", 0)
        return [pid] if pid else []

    def _timed(self, call: str, function: Callable[[], T]) -> T:
        begin = time.perf_counter()
        value = function()
        self._result.latency[call].append((time.perf_counter() - begin) * 1000)
        return value


def _untimed(_call: str, function: Callable[[], T]) -> T:
    return function()
