"""What CNI plugins are told of a pod, from its request (contract: RunPodSandbox, CNI arguments). Pure."""

from __future__ import annotations

from cri_shim.model.errors import InvalidArgument
from cri_shim.model.ids import PodId
from cri_shim.model.layout import Layout
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.quantity import parse_quantity
from cri_shim.wire.cni import Attachment, PortMapping

_INGRESS = "kubernetes.io/ingress-bandwidth"
_EGRESS = "kubernetes.io/egress-bandwidth"
_PROTOCOLS = {pb.TCP: "tcp", pb.UDP: "udp", pb.SCTP: "sctp"}


def attachment(pod_id: PodId, config: pb.PodSandboxConfig, layout: Layout) -> Attachment:
    """The same for ADD and for DEL. Raises InvalidArgument for a bandwidth that is no quantity."""
    return Attachment(
        pod_id=pod_id,
        netns=layout.namespace(pod_id, "net"),
        pod_name=config.metadata.name,
        pod_namespace=config.metadata.namespace,
        pod_uid=config.metadata.uid,
        port_mappings=tuple(
            PortMapping(_PROTOCOLS[mapping.protocol], mapping.container_port, mapping.host_port, mapping.host_ip)
            for mapping in config.port_mappings
            if mapping.host_port > 0
        ),
        ingress_bandwidth=_bandwidth(config, _INGRESS),
        egress_bandwidth=_bandwidth(config, _EGRESS),
        cgroup_path=config.linux.cgroup_parent,
        dns_servers=tuple(config.dns_config.servers),
        dns_searches=tuple(config.dns_config.searches),
        dns_options=tuple(config.dns_config.options),
        annotations=dict(config.annotations),
    )


def _bandwidth(config: pb.PodSandboxConfig, key: str) -> int | None:
    """Bits per second from a Kubernetes quantity; None when the pod says nothing."""
    text = config.annotations.get(key)
    if text is None:
        return None
    quantity = parse_quantity(text)
    if quantity is None:
        msg = f"annotation {key}: {text!r} is not a quantity of bits per second"
        raise InvalidArgument(msg, hint="for example 10M")
    return quantity
