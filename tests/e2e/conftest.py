"""What the tests of the whole daemon share: a lab, which is a daemon with images, and the pods of a test in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from cri_shim.pb import api_pb2 as pb
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import Cri, Pod, container_config, pod_config, whole_lines
from tests.support.daemon import Daemon


@dataclass(frozen=True, slots=True)
class Lab:
    """A daemon of the test's own with both images on it."""

    daemon: Daemon
    cri: Cri
    busybox: str
    wasm: str

    def pod(
        self,
        handler: str = "",
        *,
        network: pb.NamespaceMode.ValueType = pb.NODE,
        pid: pb.NamespaceMode.ValueType = pb.CONTAINER,
        config: pb.PodSandboxConfig | None = None,
    ) -> Pod:
        """Run a pod below the test's cgroup and log directory."""
        return self.cri.run_pod(config or self.pod_config(network=network, pid=pid), handler)

    def pod_config(
        self, *, network: pb.NamespaceMode.ValueType = pb.NODE, pid: pb.NamespaceMode.ValueType = pb.CONTAINER
    ) -> pb.PodSandboxConfig:
        config = pod_config(network=network, pid=pid, cgroup_parent=self.daemon.cgroup_parent)
        config.log_directory = str(self.daemon.pod_logs / config.metadata.name)
        return config

    def shell(self, script: str, *, name: str = "main") -> pb.ContainerConfig:
        """A busybox container that runs a script."""
        return container_config(self.busybox, "sh", "-c", script, name=name)

    def output(self, pod: Pod, config: pb.ContainerConfig) -> tuple[int, list[str]]:
        """Run a container to its end: exit code and log lines."""
        container = self.cri.run(pod, config)
        status = self.cri.wait_exit(container)
        return status.exit_code, whole_lines(self.cri.log(container))

    def say(
        self,
        pod: Pod,
        script: str,
        adjust: Callable[[pb.ContainerConfig], object] = lambda config: None,
        *,
        name: str = "main",
    ) -> list[str]:
        """The lines that a container with this script logs; it has to end well."""
        config = self.shell(script, name=name)
        adjust(config)
        code, lines = self.output(pod, config)
        assert code == 0, lines
        return lines


@pytest.fixture
def lab(daemon: Daemon, cri: Cri, busybox: str, registry: images.Registry) -> Lab:
    """The Wasm image prints its arguments and its environment."""
    return lab_on(daemon, cri, busybox, registry)


@pytest.fixture
def shared_lab(shared_daemon: Daemon, busybox: str, registry: images.Registry) -> Iterator[Lab]:
    """The same on the daemon of the whole file; the pods of the test go at its end."""
    with shared_daemon.client() as cri:
        yield lab_on(shared_daemon, cri, busybox, registry)
        cri.remove_all_pods()


def lab_on(daemon: Daemon, cri: Cri, busybox: str, registry: images.Registry) -> Lab:
    wasm = registry.push_wasm("test/echo:1", guests.ECHO)
    cri.pull(busybox)
    cri.pull(wasm)
    return Lab(daemon, cri, busybox, wasm)
