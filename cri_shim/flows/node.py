"""Version, Status, RuntimeConfig and UpdateRuntimeConfig: what the node is and whether it can run pods."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import cri_shim
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.network_watch import NetworkWatch
from cri_shim.model.handler import Kind
from cri_shim.model.node import NodeFacts
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.cgroup_plan import Driver

KUBELET_API_VERSION = "0.1.0"
"""What the kubelet compares; not the version of anything else."""


@dataclass(slots=True)
class Node:
    """Answers about the daemon itself. Nothing here starts a process."""

    handlers: Handlers
    network: NetworkWatch
    node: NodeFacts
    driver: Driver
    config: Mapping[str, object]
    """The configuration in force, without secrets, for verbose status."""

    async def version(self, request: pb.VersionRequest) -> pb.VersionResponse:
        """The four strings that the kubelet checks first."""
        del request
        return pb.VersionResponse(
            version=KUBELET_API_VERSION,
            runtime_name=cri_shim.RUNTIME_NAME,
            runtime_version=cri_shim.VERSION,
            runtime_api_version="v1",
        )

    async def status(self, request: pb.StatusRequest) -> pb.StatusResponse:
        """Both conditions, the handlers and, if asked for, configuration and facts.

        Only in the first moments of the daemon it waits: half a list of features would make the kubelet refuse pods.
        """
        await self.handlers.probed.wait()
        network = self.network.status()
        linux = any(handler.kind is Kind.LINUX for handler in self.handlers.live.values())
        runtime = pb.RuntimeCondition(type="RuntimeReady", status=True)
        if not linux:
            runtime.reason = "NoLinuxRuntime"
            runtime.message = "neither runc nor crun can be used: only Wasm containers run"
        conditions = [
            runtime,
            pb.RuntimeCondition(
                type="NetworkReady", status=network.ready, reason=network.reason, message=network.message
            ),
        ]
        info = self._verbose() if request.verbose else {}
        return pb.StatusResponse(
            status=pb.RuntimeStatus(conditions=conditions),
            runtime_handlers=self._runtime_handlers(),
            features=pb.RuntimeFeatures(
                supplemental_groups_policy=True,
                mount_options=True,
                user_namespaces_host_network=any(
                    not handler.features.no_user_namespaces for handler in self.handlers.live.values()
                ),
            ),
            info=info,
        )

    async def runtime_config(self, request: pb.RuntimeConfigRequest) -> pb.RuntimeConfigResponse:
        """The cgroup driver, always set: the enum's zero value means systemd."""
        del request
        driver = pb.SYSTEMD if self.driver is Driver.SYSTEMD else pb.CGROUPFS
        return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=driver))

    async def update_runtime_config(self, request: pb.UpdateRuntimeConfigRequest) -> pb.UpdateRuntimeConfigResponse:
        """The pod CIDR is the conflist's business: whoever writes that has it. Accepted, as by CRI-O."""
        del request
        return pb.UpdateRuntimeConfigResponse()

    def _runtime_handlers(self) -> list[pb.RuntimeHandler]:
        named = {"": self.handlers.live[self.handlers.default], **self.handlers.live}
        return [
            pb.RuntimeHandler(
                name=name,
                features=pb.RuntimeHandlerFeatures(
                    recursive_read_only_mounts=handler.features.recursive_read_only_mounts,
                    user_namespaces=not handler.features.no_user_namespaces,
                ),
            )
            for name, handler in named.items()
        ]

    def _verbose(self) -> dict[str, str]:
        node = {
            "hostname": self.node.hostname,
            "root": self.node.root,
            "python": platform.python_version(),
            "version": cri_shim.VERSION,
        }
        return {"config": json.dumps(self.config), "node": json.dumps(node)}
