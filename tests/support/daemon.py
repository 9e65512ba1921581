"""A private daemon: its own root, state, socket, CNI network, logs and cgroup parent, all named by one directory.

Drives the installed `cri-shim` as a process and knows nothing of its inside. Invariant: `close` leaves neither a
process nor a mount nor a cgroup of it, whatever state it is in, and raises if the daemon itself would have.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import grpc
import yaml

from cri_shim.pb import api_pb2 as pb
from tests.support import leftovers
from tests.support.cri import POLL, Cri, container_config, fault, pod_config

PROGRAM: Final = Path(sys.executable).with_name("cri-shim")
START_LIMIT: Final = 120.0
START_POLL: Final = 0.002
STOP_LIMIT: Final = 60.0
LOG_LINES: Final = 60
"""How much of a daemon's log goes into an error."""

_MAKE_ROOT_SHARED: Final = 'mount --make-rshared / && exec "$@"'

__all__ = ["Daemon", "DaemonError", "container_config", "pod_config"]


class DaemonError(Exception):
    """The daemon did not start, did not stop, or left something behind."""


class Daemon:
    """One `cri-shim serve`, started and ended at will on the same directories.

    `settings` go over the ones made here, section by section. `number` tells networks of daemons apart that run side
    by side. With `shared_root` it runs in a mount namespace of its own in which `/` is rshared, as systemd leaves it.
    """

    def __init__(
        self,
        base: Path,
        *,
        settings: Mapping[str, object] | None = None,
        number: int = 0,
        cgroup_parent: str = "",
        shared_root: bool = False,
    ) -> None:
        self.base = base
        self.root = base / "root"
        self.state = base / "run"
        self.socket = base / "cri.sock"
        self.pod_logs = base / "pods"
        self.log = base / "daemon.log"
        self.config = base / "config.yaml"
        self.cgroup_parent = cgroup_parent
        self.shared_root = shared_root
        self._network = number
        self._process: subprocess.Popen[bytes] | None = None
        # Pods with other users and user namespaces pass through here; root and state guard themselves.
        base.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._write_network()
        self.configure(settings or {})

    def configure(self, settings: Mapping[str, object]) -> None:
        """Writes the configuration anew; the next start reads it."""
        merged: dict[str, object] = {
            "listen": str(self.socket),
            "root": str(self.root),
            "state": str(self.state),
            "log": {"level": "debug", "format": "json"},
            "network": {"conf_dirs": [str(self.cni)]},
            "images": {"registry_config": [str(self.registries)]},
        }
        for key, value in settings.items():
            section = merged.get(key)
            merged[key] = {**section, **value} if isinstance(section, dict) and isinstance(value, Mapping) else value
        self.config.write_text(yaml.safe_dump(merged, sort_keys=False))

    @property
    def cni(self) -> Path:
        return self.base / "cni"

    @property
    def leases(self) -> Path:
        """Where host-local keeps one file per address in use, named by the address."""
        return self.base / "leases" / self.network_name

    @property
    def network_name(self) -> str:
        return f"pods{self._network}"

    @property
    def bridge(self) -> str:
        return f"csbr{self._network}"

    @property
    def registries(self) -> Path:
        """A directory in containerd's hosts.toml format, empty at first."""
        return self.base / "registries"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise DaemonError("the daemon was not started")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, within: float = START_LIMIT) -> float:
        """Returns once the daemon serves: the seconds from exec to the first ListContainers that was answered.

        DaemonError with the end of the log if it does not come to that.
        """
        begin = time.monotonic()
        self.spawn()
        self._wait_until(self._listens, begin + within)
        with self.client(timeout=within) as cri:
            self._wait_until(lambda: self._serves(cri), begin + within)
        return time.monotonic() - begin

    def spawn(self) -> None:
        """Starts the process and returns at once."""
        if self.is_running:
            raise DaemonError("the daemon runs already")
        command = [str(PROGRAM), "serve", "--config", str(self.config)]
        if self.shared_root:
            shell = ["sh", "-c", _MAKE_ROOT_SHARED, "sh"]
            command = ["unshare", "--mount", "--propagation", "private", "--", *shell, *command]
        environment = {**os.environ, leftovers.DAEMON_VARIABLE: str(self.base)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def stop(self, *, within: float = STOP_LIMIT) -> int:
        """Ends the daemon as systemd does. Returns its exit status; containers go on."""
        self.signal(signal.SIGTERM)
        return self.wait(within)

    def kill(self) -> None:
        """Ends the daemon with SIGKILL, in the middle of whatever it does."""
        self.signal(signal.SIGKILL)
        self.wait()

    def restart(self) -> None:
        """Stops the daemon if it runs, and starts it on what it left."""
        if self.is_running:
            self.stop()
        self.start()

    def signal(self, number: signal.Signals) -> None:
        if self.is_running:
            os.kill(self.pid, number)

    def wait(self, within: float = STOP_LIMIT) -> int:
        """Returns the exit status, negative for a signal; raises DaemonError when it is not there in time."""
        if self._process is None:
            raise DaemonError("the daemon was not started")
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired as error:
            raise DaemonError(f"cri-shim still runs after {within} s:\n{self.log_tail()}") from error

    def client(self, *, timeout: float = 60) -> Cri:
        return Cri(self.socket, timeout=timeout)

    def pod_config(
        self,
        name: str = "",
        *,
        network: pb.NamespaceMode.ValueType = pb.POD,
        pid: pb.NamespaceMode.ValueType = pb.CONTAINER,
    ) -> pb.PodSandboxConfig:
        """A pod of this daemon: it logs below `pod_logs` and lives below `cgroup_parent`."""
        config = pod_config(name, network=network, pid=pid, cgroup_parent=self.cgroup_parent)
        config.log_directory = str(self.pod_logs / config.metadata.name)
        return config

    def log_tail(self, lines: int = LOG_LINES) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "(no log)"

    def traces(self) -> leftovers.Traces:
        """The processes, mounts and cgroups that are this daemon's now.

        Without the mounts that outlive it on purpose: the state directory, shared, and the pins of mount namespaces.
        """
        found = leftovers.traces_of(self.base, self.cgroup_parent)
        pins = self.state / "mntns"
        lasting = {point for point in found.mounts if point == str(self.state) or Path(point).is_relative_to(pins)}
        return replace(found, mounts=found.mounts - lasting)

    def close(self) -> None:
        """Removes every pod, ends the daemon and raises DaemonError if anything of it is left."""
        try:
            if not self.is_running:
                self.start()
            with self.client() as cri:
                cri.remove_all_pods()
            status = self.stop()
            left = self.settled_traces()
        except (DaemonError, grpc.RpcError):
            self.sweep()
            raise
        if left:
            self.sweep()
            raise DaemonError("left behind:\n" + "\n".join(left.lines()))
        self.sweep()
        if status != 0:
            raise DaemonError(f"cri-shim ended with {status} on SIGTERM:\n{self.log_tail()}")

    def settled_traces(self, within: float = 30) -> leftovers.Traces:
        """What is left of a daemon that has ended: its helpers see the end a moment later than we do."""
        deadline = time.monotonic() + within
        while (left := self.traces()) and time.monotonic() < deadline:
            time.sleep(POLL)
        return left

    def sweep(self) -> None:
        """Ends and removes by force what is left."""
        leftovers.sweep(self.base, self.cgroup_parent)
        if self._process is not None:
            self._process.wait()

    def _wait_until(self, reached: Callable[[], bool], deadline: float) -> None:
        while not reached():
            if not self.is_running:
                raise DaemonError(f"cri-shim ended with {self.wait()} at start:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise DaemonError(f"cri-shim does not serve in time:\n{self.log_tail()}")
            time.sleep(START_POLL)

    def _listens(self) -> bool:
        """By connect(2): a gRPC channel that was refused once waits a second before it tries again."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def _serves(self, cri: Cri) -> bool:
        """Whether the daemon is through with recovery."""
        try:
            cri.containers()
        except grpc.RpcError as error:
            code, words = fault(error)
            if code is not grpc.StatusCode.UNAVAILABLE:
                raise DaemonError(f"ListContainers: {code.name}: {words}\n{self.log_tail()}") from error
            return False
        return True

    def _write_network(self) -> None:
        # Of its own for each of 2,672 daemons: bridges stay in the run's network namespace, and with them their routes.
        subnet = f"10.{88 + self._network // 16}.{self._network % 16 * 16}.0/20"
        ipam = {
            "type": "host-local",
            "dataDir": str(self.leases.parent),
            "ranges": [[{"subnet": subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": self.bridge, "isGateway": True, "ipMasq": True, "hairpinMode": True}
        plugins = [{**bridge, "ipam": ipam}, {"type": "portmap", "capabilities": {"portMappings": True}}]
        network = {"cniVersion": "1.0.0", "name": self.network_name, "plugins": plugins}
        self.cni.mkdir(exist_ok=True)
        self.registries.mkdir(exist_ok=True)
        (self.cni / "10-pods.conflist").write_text(json.dumps(network, indent=1))
