"""CNI documents: network configurations in, plugin input and environment out, results and errors back.

Pure: `cri_shim.adapters.network` runs the plugins. CNI specification 1.1.0, read back to 0.3.0. Invariant: a
`NetworkConfig` that exists is complete: each of its plugins can be called.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from cri_shim.model.errors import InvalidArgument

Json = dict[str, Any]

VERSIONS: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""What is understood, ascending. Results have the same shape in all of them, as far as we read them."""
INTERFACE: Final = "eth0"
"""CNI_IFNAME of a pod's only interface beside lo (contract: kubelet and CRI)."""
SUFFIXES: Final = frozenset({".conflist", ".conf", ".json"})

_NO_BURST: Final = (1 << 31) - 1
"""Bits; the bandwidth plugin wants a burst with each rate, and this much is no limit in practice."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # spec 1.1, section 1
_HAS_PREV_RESULT_ON_DEL: Final = VERSIONS[2:]


class Verb(enum.Enum):
    """What a plugin can be asked to do: CNI_COMMAND."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    STATUS = "STATUS"
    GC = "GC"


_SINCE: Final = {Verb.CHECK: "0.4.0", Verb.STATUS: "1.1.0", Verb.GC: "1.1.0"}


@dataclass(frozen=True, slots=True)
class PortMapping:
    """One port of the node that leads to the pod; `protocol` is tcp, udp or sctp, `host_ip` empty for any."""

    protocol: str
    container_port: int
    host_port: int
    host_ip: str = ""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A pod and what its network is told about it. Bandwidths are bits per second."""

    pod_id: str
    netns: Path
    pod_name: str
    pod_namespace: str
    pod_uid: str
    port_mappings: tuple[PortMapping, ...] = ()
    ingress_bandwidth: int | None = None
    egress_bandwidth: int | None = None
    cgroup_path: str = ""
    dns_servers: tuple[str, ...] = ()
    dns_searches: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin of a chain: the program's name, the capabilities it asks for, its whole configuration."""

    type: str
    capabilities: frozenset[str]
    config: Json


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """A network: its plugins are called in order on ADD, in reverse on DEL."""

    name: str
    version: str
    plugins: tuple[Plugin, ...]
    disabled: frozenset[Verb] = frozenset()
    """What its author does not want to be asked: `disableCheck`, `disableGC`."""

    def has(self, verb: Verb) -> bool:
        """Whether its plugins may be asked for `verb`: its version knows it, its author allows it."""
        since = _SINCE.get(verb, VERSIONS[0])
        return VERSIONS.index(self.version) >= VERSIONS.index(since) and verb not in self.disabled


@dataclass(frozen=True, slots=True)
class PluginError:
    """What a plugin says about its failure (spec 1.1, section 5, Error)."""

    code: int
    message: str
    details: str

    def text(self) -> str:
        """One line: message, details, code."""
        return f"{self.message}{f': {self.details}' if self.details else ''} (code {self.code})"


class _PluginShape(msgspec.Struct):
    type: str
    capabilities: dict[str, bool] = {}


class _ListShape(msgspec.Struct, rename="camel"):
    name: str
    plugins: list[_PluginShape]
    cni_version: str = ""
    cni_versions: list[str] = []
    disable_check: bool | str = False
    disable_gc: bool | str = msgspec.field(name="disableGC", default=False)


class _Interface(msgspec.Struct):
    name: str
    sandbox: str = ""


class _Address(msgspec.Struct):
    address: str
    interface: int | None = None


class _ResultShape(msgspec.Struct):
    interfaces: list[_Interface] = []
    ips: list[_Address] = []


class _ErrorShape(msgspec.Struct):
    code: int
    msg: str = ""
    details: str = ""


def parse_network(data: bytes, file: str) -> NetworkConfig:
    """Parse a configuration list, or a single plugin's configuration as a list of one (by content, not by suffix).

    InvalidArgument names `file` and the reason.
    """
    where = f"CNI configuration {file}"
    document = _object(data, where)
    if "plugins" not in document:
        document = {key: document[key] for key in ("name", "cniVersion") if key in document} | {"plugins": [document]}
    return _network(document, where)


def _network(document: Json, where: str) -> NetworkConfig:
    try:
        shape = msgspec.convert(document, _ListShape)
    except msgspec.ValidationError as error:
        msg = f"{where}: {error}"
        raise InvalidArgument(msg) from error
    reason = _refusal(shape)
    if reason:
        msg = f"{where}: {reason}"
        raise InvalidArgument(msg)
    plugins = tuple(
        Plugin(plugin.type, frozenset(name for name, wanted in plugin.capabilities.items() if wanted), raw)
        for plugin, raw in zip(shape.plugins, document["plugins"], strict=True)
    )
    switches = ((Verb.CHECK, shape.disable_check), (Verb.GC, shape.disable_gc))
    # A text in version 0.4.0, a boolean since.
    disabled = frozenset(verb for verb, value in switches if value in {True, "true"})
    return NetworkConfig(shape.name, _version(shape), plugins, disabled)


def _version(shape: _ListShape) -> str:
    known = {shape.cni_version, *shape.cni_versions} & set(VERSIONS)
    return max(known, key=VERSIONS.index, default="")


def _refusal(shape: _ListShape) -> str:
    if not _version(shape):
        given = shape.cni_version or ", ".join(shape.cni_versions)
        return f"cniVersion {given!r} is not supported, only {', '.join(VERSIONS)}"
    if _NAME.fullmatch(shape.name) is None:
        return f"name {shape.name[:100]!r} is not a network name"
    if not shape.plugins:
        return "plugins is empty"
    bad = next((plugin.type for plugin in shape.plugins if not _is_program(plugin.type)), None)
    return "" if bad is None else f"type {bad[:100]!r} is not the name of a plugin program"


def _is_program(name: str) -> bool:
    return name.isprintable() and "/" not in name and name not in {"", ".", ".."}


def _object(data: bytes, where: str) -> Json:
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        msg = f"{where} is not JSON: {error}"
        raise InvalidArgument(msg) from error
    if not isinstance(document, dict):
        msg = f"{where} is not a JSON object"
        raise InvalidArgument(msg)
    return document


def stdin_for_add(network: NetworkConfig, plugin: Plugin, attachment: Attachment, previous: Json | None) -> bytes:
    """What a plugin reads on ADD; `previous` is the result of the plugin before it."""
    return _stdin(network, plugin, attachment, previous)


def stdin_for_del(network: NetworkConfig, plugin: Plugin, attachment: Attachment, final: Json | None) -> bytes:
    """What a plugin reads on DEL; `final` is the result of the whole chain. Before 0.4.0 plugins are not given it."""
    return _stdin(network, plugin, attachment, final if network.version in _HAS_PREV_RESULT_ON_DEL else None)


def stdin_for_check(network: NetworkConfig, plugin: Plugin, attachment: Attachment, final: Json) -> bytes:
    """What a plugin reads on CHECK; `final` is the result of the whole chain."""
    return _stdin(network, plugin, attachment, final)


def stdin_for_status(network: NetworkConfig, plugin: Plugin) -> bytes:
    """What a plugin reads on STATUS: nothing of any pod."""
    return msgspec.json.encode(_request(network, plugin))


def stdin_for_gc(network: NetworkConfig, plugin: Plugin, pod_ids: Sequence[str]) -> bytes:
    """What a plugin reads on GC: the attachments that there still are. All others of this network can go."""
    valid = [{"containerID": pod_id, "ifname": INTERFACE} for pod_id in pod_ids]
    # The specification's first text of 1.1.0 had the second name, and plugins were written by it.
    return msgspec.json.encode(
        _request(network, plugin) | {"cni.dev/valid-attachments": valid, "cni.dev/attachments": valid}
    )


def _request(network: NetworkConfig, plugin: Plugin) -> Json:
    # spec 1.1, section 3, "Deriving request configuration from plugin configuration"
    return plugin.config | {"name": network.name, "cniVersion": network.version}


def _stdin(network: NetworkConfig, plugin: Plugin, attachment: Attachment, previous: Json | None) -> bytes:
    request = _request(network, plugin)
    runtime = {name: value for name, value in _capabilities(attachment).items() if name in plugin.capabilities}
    if runtime:
        request["runtimeConfig"] = runtime
    if previous is not None:
        request["prevResult"] = previous
    return msgspec.json.encode(request)


def _capabilities(attachment: Attachment) -> Json:
    """What we can tell by capability (containerd/cni, CONVENTIONS.md); what says nothing is left out."""
    told: Json = {
        "portMappings": [
            {
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": port.protocol,
                "hostIP": port.host_ip,
            }
            for port in attachment.port_mappings
            if port.host_port > 0
        ],
        "bandwidth": _bandwidth(attachment),
        "dns": {
            key: list(values)
            for key, values in (
                ("servers", attachment.dns_servers),
                ("searches", attachment.dns_searches),
                ("options", attachment.dns_options),
            )
            if values
        },
        "cgroupPath": attachment.cgroup_path,
        "io.kubernetes.cri.pod-annotations": dict(attachment.annotations),
    }
    return {name: value for name, value in told.items() if value}


def _bandwidth(attachment: Attachment) -> Json:
    limits = (("ingress", attachment.ingress_bandwidth), ("egress", attachment.egress_bandwidth))
    return {
        f"{direction}{what}": value
        for direction, rate in limits
        if rate
        for what, value in (("Rate", rate), ("Burst", _NO_BURST))
    }


def network_environment(verb: Verb, bin_dirs: Sequence[Path]) -> dict[str, str]:
    """The CNI_* variables of a call that is about no pod: STATUS and GC."""
    return {"CNI_COMMAND": verb.value, "CNI_PATH": ":".join(map(str, bin_dirs))}


def environment(verb: Verb, attachment: Attachment, netns: str, bin_dirs: Sequence[Path]) -> dict[str, str]:
    """The CNI_* variables of a call about a pod; `netns` is empty on the DEL of a namespace that is gone."""
    arguments = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": attachment.pod_namespace,
        "K8S_POD_NAME": attachment.pod_name,
        "K8S_POD_INFRA_CONTAINER_ID": attachment.pod_id,
        "K8S_POD_UID": attachment.pod_uid,
    }
    return {
        **network_environment(verb, bin_dirs),
        "CNI_CONTAINERID": attachment.pod_id,
        "CNI_NETNS": netns,
        "CNI_IFNAME": INTERFACE,
        # The format has no quoting: a value that would end its pair is left out, it is no name that Kubernetes allows.
        "CNI_ARGS": ";".join(f"{k}={v}" for k, v in arguments.items() if v.isprintable() and not {";", "="} & set(v)),
    }


def parse_result(data: bytes, plugin: str) -> Json:
    """The result that a plugin prints after ADD. InvalidArgument names the plugin."""
    where = f"result of CNI plugin {plugin}"
    result = _object(data, where)
    addresses_of(result, where)
    return result


def parse_error(data: bytes) -> PluginError | None:
    """The error that a plugin prints; None when it printed something else."""
    try:
        shape = msgspec.json.decode(data, type=_ErrorShape)
    except (msgspec.DecodeError, RecursionError):
        return None
    return PluginError(shape.code, shape.msg, shape.details)


def addresses_of(result: Json, where: str = "CNI result") -> tuple[str, ...]:
    """The pod's addresses: those of eth0 inside the sandbox, IPv4 first, else all that name no interface."""
    try:
        shape = msgspec.convert(result, _ResultShape)
        addresses = [(entry, ipaddress.ip_interface(entry.address).ip) for entry in shape.ips]
    except (msgspec.ValidationError, ValueError) as error:
        msg = f"{where}: {error}"
        raise InvalidArgument(msg) from error
    inside = {i for i, interface in enumerate(shape.interfaces) if interface.sandbox and interface.name == INTERFACE}
    chosen = [ip for entry, ip in addresses if entry.interface is None or entry.interface in inside]
    return tuple(str(ip) for ip in sorted(chosen, key=lambda ip: ip.version))


def format_cached(network: NetworkConfig, result: Json) -> bytes:
    """What DEL needs later, even when the configuration has changed or gone: the configuration used and the result."""
    used = {
        "name": network.name,
        "cniVersion": network.version,
        "disableCheck": Verb.CHECK in network.disabled,
        "plugins": [plugin.config for plugin in network.plugins],
    }
    return msgspec.json.encode({"network": used, "result": result})


def parse_cached(data: bytes) -> tuple[NetworkConfig, Json]:
    """The reverse of `format_cached`. InvalidArgument when it is damaged."""
    where = "cached CNI result"
    document = _object(data, where)
    network, result = document.get("network"), document.get("result")
    if not isinstance(network, dict) or not isinstance(result, dict):
        msg = f"{where} lacks its network or result"
        raise InvalidArgument(msg)
    return _network(network, where), result
