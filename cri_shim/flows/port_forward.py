"""PortForward: connections of a client to ports inside a pod.

Not the pod's network (`flows.pod_run`). Invariant: a connection reaches what listens in the pod's network namespace,
and nothing of the node's, unless the pod's network is the node's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from cri_shim.adapters import pod_port
from cri_shim.adapters.store import Store
from cri_shim.flows.lookup import existing_pod
from cri_shim.model.errors import InvalidArgument, WrongState
from cri_shim.model.ids import SHORT
from cri_shim.model.layout import Layout
from cri_shim.model.pod import PodRecord, PodState
from cri_shim.model.streams import Connection, StreamingServer
from cri_shim.pb import api_pb2 as pb


@dataclass(slots=True)
class PortForward:
    """The flow."""

    store: Store
    layout: Layout
    server: StreamingServer

    async def __call__(self, request: pb.PortForwardRequest) -> pb.PortForwardResponse:
        """Give out a URL; connections are made when a client asks for them."""
        pod = existing_pod(self.store, request.pod_sandbox_id)
        _check_ready(pod)
        for port in request.port:
            _check_port(port)
        netns = _network(pod, self.layout)
        still_ready = functools.partial(self._check, pod.id)
        connect = functools.partial(self._connect, pod.id, netns)
        return pb.PortForwardResponse(url=self.server.port_forward_url(tuple(request.port), connect, still_ready))

    def _check(self, pod_id: str) -> None:
        _check_ready(existing_pod(self.store, pod_id))

    async def _connect(self, pod_id: str, netns: Path | None, port: int) -> Connection:
        self._check(pod_id)
        _check_port(port)
        return await pod_port.connect(netns, port)


def _check_ready(pod: PodRecord) -> None:
    if pod.state is not PodState.READY:
        msg = f"pod sandbox {pod.id[:SHORT]} is not ready"
        raise WrongState(msg)


def _check_port(port: int) -> None:
    if not 0 < port <= 65535:
        msg = f"port {port} is not between 1 and 65535"
        raise InvalidArgument(msg)


def _network(pod: PodRecord, layout: Layout) -> Path | None:
    """The pod's network namespace; None = the node's."""
    config = pb.PodSandboxConfig.FromString(pod.config)
    if config.linux.security_context.namespace_options.network == pb.NamespaceMode.NODE:
        return None
    return layout.namespace(pod.id, "net")
