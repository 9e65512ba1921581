"""PodSandboxStatus and ListPodSandbox, from memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from cri_shim.adapters.store import Store
from cri_shim.flows.entries import Entries, Listed
from cri_shim.flows.infra import Infra
from cri_shim.flows.lookup import existing_pod
from cri_shim.model.errors import InvalidArgument
from cri_shim.model.pod import PodRecord, PodState
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.pod import namespaces


@dataclass(slots=True)
class QueryPods:
    """Answers from the records."""

    store: Store
    infra: Infra
    _entries: Entries[PodRecord, Listed[pb.PodSandbox]] = field(default_factory=lambda: Entries(_entry))

    async def list(self, request: pb.ListPodSandboxRequest) -> pb.ListPodSandboxResponse:
        """All pods that match every given field of the filter."""
        visible = (pod for pod in self.store.pods.values() if pod.state is not PodState.PENDING)
        entries = self._entries.of(visible)
        if request.filter.ByteSize():  # the kubelet mostly wants all
            entries = [entry for entry in entries if _matches(entry.message, request.filter)]
        return pb.ListPodSandboxResponse.FromString(b"".join(entry.alone for entry in entries))

    async def status(self, request: pb.PodSandboxStatusRequest) -> pb.PodSandboxStatusResponse:
        """One pod; NotFound when there is none."""
        if not request.pod_sandbox_id:
            msg = "pod_sandbox_id is empty"
            raise InvalidArgument(msg)
        pod = existing_pod(self.store, request.pod_sandbox_id)
        config = pb.PodSandboxConfig.FromString(pod.config)
        status = pb.PodSandboxStatus(
            id=pod.id,
            metadata=config.metadata,
            state=_state(pod),
            created_at=pod.created_at,
            labels=config.labels,
            annotations=config.annotations,
            runtime_handler=pod.runtime_handler,
            linux=pb.LinuxPodSandboxStatus(namespaces=pb.Namespace(options=namespaces(config))),
            network=pb.PodSandboxNetworkStatus(
                ip=pod.ips[0] if pod.ips else "", additional_ips=[pb.PodIP(ip=ip) for ip in pod.ips[1:]]
            ),
        )
        info = {"info": json.dumps(self._verbose(pod))} if request.verbose else {}
        return pb.PodSandboxStatusResponse(status=status, info=info)

    def _verbose(self, pod: PodRecord) -> dict[str, object]:
        return {
            "handler": pod.handler,
            "problem": pod.problem,
            "pid": self.infra.pid(pod.id),
            "networkAttached": pod.attachment is not None,
            "cniResult": json.loads(pod.attachment) if pod.attachment else None,
        }


def _entry(pod: PodRecord) -> Listed[pb.PodSandbox]:
    config = pb.PodSandboxConfig.FromString(pod.config)
    entry = pb.PodSandbox(
        id=pod.id,
        metadata=config.metadata,
        state=_state(pod),
        created_at=pod.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=pod.runtime_handler,
    )
    return Listed(entry, pb.ListPodSandboxResponse(items=[entry]).SerializeToString())


def _state(pod: PodRecord) -> pb.PodSandboxState.ValueType:
    return pb.SANDBOX_READY if pod.state is PodState.READY else pb.SANDBOX_NOTREADY


def _matches(entry: pb.PodSandbox, wanted: pb.PodSandboxFilter) -> bool:
    if wanted.id and not entry.id.startswith(wanted.id):
        return False
    if wanted.HasField("state") and entry.state != wanted.state.state:
        return False
    return all(entry.labels.get(key) == value for key, value in wanted.label_selector.items())
