"""A pod sandbox from its request: checks, names, shared files and the view that its containers get.

Not the making of it (`cri_shim.adapters.sandbox`). Invariant: a field of `PodSandboxConfig` is honoured or refused by
name, before anything has been made.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.handler import Kind, PodContext
from cri_shim.model.ids import PodId
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.model.pod import PodName, PodRecord
from cri_shim.model.selinux import Label
from cri_shim.model.user_namespace import UserNamespace
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import selinux
from cri_shim.spec.dispatch import ANNOTATION_PREFIX, HandlerRules
from cri_shim.spec.namespaces import user_namespace
from cri_shim.spec.paths import check_path
from cri_shim.spec.quantity import parse_quantity
from cri_shim.spec.sysctls import namespace_of, sysctls

MAX_NAME = 253  # a Kubernetes object name (DNS subdomain)
MAX_HOSTNAME = 64  # Linux __NEW_UTS_LEN
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
SHM_BYTES = 64 << 20
SHM_SIZE = f"{ANNOTATION_PREFIX}shm-size"
"""Annotation: the size of /dev/shm. The others are CRI-O's names for it."""
_SHM_SIZES = (SHM_SIZE, "shm-size.crio.io", "io.kubernetes.cri-o.ShmSize")


@dataclass(frozen=True, slots=True)
class SandboxPlan:
    """What has to be made for a pod. Absent namespaces are the host's."""

    user: UserNamespace | None
    net: bool
    ipc: bool
    ipc_later: bool
    """The IPC namespace and /dev/shm wait for the first Linux container: modules use neither."""
    uts: bool
    hostname: str
    sysctls: Mapping[str, str]
    shm_bytes: int
    """Of a /dev/shm of the pod's own."""
    resolv_conf: bytes | None
    """None: a copy of the host's."""
    log_directory: str


def namespaces(config: pb.PodSandboxConfig) -> pb.NamespaceOption:
    """The pod's namespace options; absent ones are all POD."""
    return config.linux.security_context.namespace_options


def host_network(config: pb.PodSandboxConfig) -> bool:
    """Whether the pod uses the node's network."""
    return namespaces(config).network == pb.NODE


def shares_pid(config: pb.PodSandboxConfig) -> bool:
    """Whether the pod has one PID namespace for all its containers."""
    return namespaces(config).pid == pb.POD


def pod_name(config: pb.PodSandboxConfig) -> PodName:
    """The name that a pod reserves. Raises InvalidArgument for missing or over-long parts of the metadata."""
    metadata = config.metadata
    check_name("metadata.name", metadata.name)
    check_name("metadata.namespace", metadata.namespace)
    check_name("metadata.uid", metadata.uid)
    return PodName(f"{metadata.name}_{metadata.namespace}_{metadata.uid}_{metadata.attempt}")


def check_name(field: str, value: str) -> None:
    """Names become parts of paths and annotations: present, bounded, printable, no slash."""
    if not value:
        msg = f"{field} is empty"
        raise InvalidArgument(msg)
    if len(value.encode()) > MAX_NAME:
        msg = f"{field} is {len(value.encode())} bytes long, at most {MAX_NAME} are allowed"
        raise InvalidArgument(msg)
    if "/" in value or not value.isprintable():
        msg = f"{field} {value!r} has a slash or unprintable characters"
        raise InvalidArgument(msg)


def plan_sandbox(config: pb.PodSandboxConfig, node: NodeFacts, rules: HandlerRules) -> SandboxPlan:
    """Check the request and say what to make; `rules` are those of the pod's handler. Raises what names the field."""
    _check_fields(config)
    _check_security(config, node)
    if not node.root and not host_network(config):
        msg = "linux.security_context.namespace_options.network: the daemon runs without root and cannot make a network"
        raise FailedPrecondition(msg, hint="ask for the node's network (NODE), or run the daemon as root")
    options = namespaces(config)
    own_net = not host_network(config)
    own_ipc = options.ipc != pb.NODE
    user = user_namespace(options)
    to_set = sysctls(config.linux.sysctls, rules.default_sysctls, user, net=own_net, ipc=own_ipc)
    return SandboxPlan(
        user=user,
        net=own_net,
        ipc=own_ipc,
        # A sysctl that the kernel refuses has to fail the pod, not a container.
        ipc_later=rules.kind is Kind.WASM and not any(namespace_of(name, "sysctls") == "IPC" for name in to_set),
        uts=own_net,
        hostname=config.hostname if own_net and config.hostname else node.hostname,
        sysctls=to_set,
        shm_bytes=_allowed_shm_bytes(config.annotations, rules, own_ipc=own_ipc),
        resolv_conf=resolv_conf(config.dns_config) if config.HasField("dns_config") else None,
        log_directory=config.log_directory,
    )


def current_config(pod: PodRecord) -> pb.PodSandboxConfig:
    """The request with the resources that were updated since."""
    config = pb.PodSandboxConfig.FromString(pod.config)
    if pod.overhead is not None:
        config.linux.overhead.ParseFromString(pod.overhead)
    if pod.resources is not None:
        config.linux.resources.ParseFromString(pod.resources)
    return config


def context(
    pod_id: PodId, config: pb.PodSandboxConfig, layout: Layout, node: NodeFacts, selinux_level: str
) -> PodContext:
    """What the containers of the pod share: every path follows from the id. The level is that of the pod's record."""
    own_net = not host_network(config)
    own_ipc = namespaces(config).ipc != pb.NODE
    ids = user_namespace(namespaces(config))
    directory = layout.pod(pod_id)
    return PodContext(
        id=pod_id,
        config=config,
        hostname=config.hostname if own_net and config.hostname else node.hostname,
        cgroup_parent=config.linux.cgroup_parent,
        net=layout.namespace(pod_id, "net") if own_net else None,
        ipc=layout.namespace(pod_id, "ipc") if own_ipc else None,
        uts=layout.namespace(pod_id, "uts") if own_net else None,
        pid=layout.namespace(pod_id, "pid") if shares_pid(config) else None,
        shm=directory / "shm",
        resolv_conf=directory / "resolv.conf",
        hosts=directory / "hosts",
        hostname_file=directory / "hostname",
        user=layout.namespace(pod_id, "user") if ids else None,
        ids=ids,
        selinux=selinux_label(config, node, selinux_level),
    )


def selinux_label(config: pb.PodSandboxConfig, node: NodeFacts, level: str) -> Label | None:
    """The pod's SELinux label with the level that was chosen for it; None where nothing is labelled."""
    if node.selinux_contexts is None:
        return None
    return selinux.pod_label(node.selinux_contexts, config.linux.security_context.selinux_options, level)


def resolv_conf(dns: pb.DNSConfig) -> bytes:
    """The pod's resolv.conf (resolv.conf(5)): search, nameservers, options, in that order."""
    for field, values in (("servers", dns.servers), ("searches", dns.searches), ("options", dns.options)):
        for value in values:
            if not value or any(c.isspace() or not c.isprintable() for c in value):
                msg = f"dns_config.{field}: {value!r} is empty or has white space"
                raise InvalidArgument(msg)
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    return "".join(f"{line}\n" for line in lines).encode()


def _check_fields(config: pb.PodSandboxConfig) -> None:
    if config.HasField("windows"):
        msg = "windows: this node runs Linux"
        raise InvalidArgument(msg)
    if config.log_directory:
        check_path("log_directory", config.log_directory)
    if config.hostname and (len(config.hostname) > MAX_HOSTNAME or _HOSTNAME.fullmatch(config.hostname) is None):
        msg = f"hostname {config.hostname[:MAX_NAME]!r} is not a host name of at most {MAX_HOSTNAME} characters"
        raise InvalidArgument(msg)
    _check_ports(config.port_mappings)
    options = namespaces(config)
    if pb.TARGET in {options.network, options.pid, options.ipc}:
        msg = "linux.security_context.namespace_options: TARGET is for containers, a pod has no target"
        raise InvalidArgument(msg)
    if pb.CONTAINER in {options.network, options.ipc}:
        msg = "linux.security_context.namespace_options: CONTAINER is for pid, a pod's containers share network and ipc"
        raise InvalidArgument(msg)
    if user_namespace(options) is not None:
        _check_beside_user_namespace(options)


def _check_beside_user_namespace(options: pb.NamespaceOption) -> None:
    """What belongs to the node's user namespace cannot be mounted by a root of another one: /proc, /dev/mqueue."""
    for field, mode in (("pid", options.pid), ("ipc", options.ipc)):
        if mode == pb.NODE:
            msg = f"linux.security_context.namespace_options.{field}: NODE goes with userns_options.mode NODE only"
            raise InvalidArgument(msg, hint="the pod has a user namespace of its own")


def shm_bytes(annotations: Mapping[str, str]) -> int:
    """The size of /dev/shm that a pod asks for, or the usual one. InvalidArgument for what is no size."""
    key = _shm_key(annotations)
    if key is None:
        return SHM_BYTES
    size = parse_quantity(annotations[key])
    if not size:
        msg = f"annotation {key}: {annotations[key][:MAX_NAME]!r} is not a size"
        raise InvalidArgument(msg, hint="for example 256Mi")
    return size


def _shm_key(annotations: Mapping[str, str]) -> str | None:
    return next((key for key in _SHM_SIZES if key in annotations), None)


def _allowed_shm_bytes(annotations: Mapping[str, str], rules: HandlerRules, *, own_ipc: bool) -> int:
    size, key = shm_bytes(annotations), _shm_key(annotations)
    if key is None:
        return size
    if SHM_SIZE.removeprefix(ANNOTATION_PREFIX) not in rules.allowed_annotations:
        msg = f"annotation {key} is not allowed by handler {rules.name!r}"
        raise InvalidArgument(msg, hint="the node's administrator lists shm-size in the handler's allowed_annotations")
    if not own_ipc:
        msg = f"annotation {key} needs an IPC namespace of the pod's own"
        raise InvalidArgument(msg)
    return size


def _check_ports(mappings: Iterable[pb.PortMapping]) -> None:
    for mapping in mappings:
        if mapping.protocol not in pb.Protocol.values():
            msg = f"port_mappings.protocol: {mapping.protocol} is no protocol of the CRI"
            raise InvalidArgument(msg)
        for field, port in (("container_port", mapping.container_port), ("host_port", mapping.host_port)):
            if not 0 <= port <= 65535:
                msg = f"port_mappings.{field}: {port} is not a port"
                raise InvalidArgument(msg)
        if mapping.host_port and not mapping.container_port:
            msg = f"port_mappings.container_port: 0 is no port that host_port {mapping.host_port} could lead to"
            raise InvalidArgument(msg)
        if mapping.host_ip:
            try:
                ipaddress.ip_address(mapping.host_ip)
            except ValueError:
                msg = f"port_mappings.host_ip: {mapping.host_ip!r} is not an IP address"
                raise InvalidArgument(msg) from None


def _check_security(config: pb.PodSandboxConfig, node: NodeFacts) -> None:
    security = config.linux.security_context
    selinux.check_options(security.selinux_options, selinux_label(config, node, ""), enabled=node.selinux)
    if security.apparmor.profile_type == pb.SecurityProfile.Localhost and not node.apparmor:
        msg = "linux.security_context.apparmor: AppArmor is not enabled on this node"
        raise FailedPrecondition(msg)
