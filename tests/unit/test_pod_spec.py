"""What a pod's request means: plans, shared files, and refusals that name the field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cri_shim.model.errors import CriShimError, FailedPrecondition, InvalidArgument
from cri_shim.model.handler import Kind
from cri_shim.model.ids import PodId
from cri_shim.model.layout import Layout
from cri_shim.model.node import NodeFacts
from cri_shim.model.selinux import Contexts, Label
from cri_shim.model.user_namespace import IdRange, UserNamespace
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec import container_request, pod
from cri_shim.spec.dispatch import HandlerRules

NODE = NodeFacts(hostname="node-1", boot_id="b", root=True)
RULES = HandlerRules("runc", Kind.LINUX)


def _config(**fields: object) -> pb.PodSandboxConfig:
    config = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="n", uid="u", namespace="s", attempt=2))
    config.MergeFrom(pb.PodSandboxConfig(**fields))  # type: ignore[arg-type]
    return config


def _linux(**security: object) -> pb.LinuxPodSandboxConfig:
    return pb.LinuxPodSandboxConfig(security_context=pb.LinuxSandboxSecurityContext(**security))  # type: ignore[arg-type]


def _namespaces(**options: object) -> pb.LinuxPodSandboxConfig:
    return _linux(namespace_options=pb.NamespaceOption(**options))  # type: ignore[arg-type]


def _ids(**fields: int) -> pb.IDMapping:
    return pb.IDMapping(**{"host_id": 1000, "length": 10, **fields})


TEN = _ids()


def _userns(**fields: object) -> pb.LinuxPodSandboxConfig:
    return _namespaces(userns_options=pb.UserNamespace(**fields))  # type: ignore[arg-type]


def _mapped(**options: object) -> pb.LinuxPodSandboxConfig:
    return _namespaces(userns_options=pb.UserNamespace(uids=[TEN], gids=[TEN]), **options)


def test_a_bare_pod_gets_everything_of_its_own() -> None:
    plan = pod.plan_sandbox(_config(), NODE, RULES)
    assert (plan.net, plan.ipc, plan.uts, plan.hostname) == (True, True, True, "node-1")
    assert plan.sysctls["net.ipv4.ip_unprivileged_port_start"] == "0"
    assert plan.resolv_conf is None


def test_the_host_network_brings_the_hosts_name() -> None:
    plan = pod.plan_sandbox(_config(hostname="mine", linux=_namespaces(network=pb.NODE, ipc=pb.NODE)), NODE, RULES)
    assert (plan.net, plan.ipc, plan.uts, plan.hostname) == (False, False, False, "node-1")
    assert plan.sysctls == {}


def test_modules_need_no_ipc_and_wait_for_it_unless_something_is_set_there() -> None:
    modules = HandlerRules("wasm", Kind.WASM)
    waiting = pod.plan_sandbox(_config(), NODE, modules)
    assert (waiting.net, waiting.ipc, waiting.ipc_later) == (True, True, True)
    assert not pod.plan_sandbox(_config(), NODE, RULES).ipc_later
    asked = pb.LinuxPodSandboxConfig(sysctls={"kernel.shm_rmid_forced": "1"})
    assert not pod.plan_sandbox(_config(linux=asked), NODE, modules).ipc_later
    default = dataclasses.replace(modules, default_sysctls={"fs.mqueue.msg_max": "100"})
    assert not pod.plan_sandbox(_config(), NODE, default).ipc_later


def test_default_sysctls_are_of_the_pods_own_namespaces_and_give_way() -> None:
    defaults = {
        "net.core.somaxconn": "4096",
        "kernel.shm_rmid_forced": "1",
        "net.ipv4.ip_unprivileged_port_start": "80",
    }
    rules = HandlerRules("runc", Kind.LINUX, default_sysctls=defaults)
    linux = pb.LinuxPodSandboxConfig(sysctls={"net.core.somaxconn": "128"})
    assert pod.plan_sandbox(_config(linux=linux), NODE, rules).sysctls == {
        "net.ipv4.ip_unprivileged_port_start": "80",
        "net.ipv4.ping_group_range": "0 2147483647",
        "net.core.somaxconn": "128",
        "kernel.shm_rmid_forced": "1",
    }
    hosts = pod.plan_sandbox(_config(linux=_namespaces(network=pb.NODE)), NODE, rules)
    assert hosts.sysctls == {"kernel.shm_rmid_forced": "1"}


@pytest.mark.parametrize("name", ["cri-shim.io/shm-size", "shm-size.crio.io", "io.kubernetes.cri-o.ShmSize"])
def test_the_size_of_shared_memory(name: str) -> None:
    assert pod.plan_sandbox(_config(), NODE, RULES).shm_bytes == 64 << 20
    asked = _config(annotations={name: "1Gi"})
    assert pod.plan_sandbox(asked, NODE, RULES).shm_bytes == 1 << 30
    for value in ("", "0", "-1", "much", "1.5Gi"):
        with pytest.raises(InvalidArgument, match=f"annotation {name}: .* is not a size"):
            pod.plan_sandbox(_config(annotations={name: value}), NODE, RULES)
    with pytest.raises(InvalidArgument, match=f"annotation {name} is not allowed by handler 'strict'"):
        pod.plan_sandbox(asked, NODE, HandlerRules("strict", Kind.LINUX, allowed_annotations=()))
    asked.linux.security_context.namespace_options.ipc = pb.NODE
    with pytest.raises(InvalidArgument, match=f"annotation {name} needs an IPC namespace"):
        pod.plan_sandbox(asked, NODE, RULES)


def test_the_label_of_a_pod() -> None:
    contexts = Contexts("u:r:container_t:s0", "u:object_r:container_file_t:s0")
    labelling = dataclasses.replace(NODE, selinux=True, selinux_contexts=contexts)
    asked = _config(linux=_linux(selinux_options=pb.SELinuxOption(type="mine_t")))
    pod.plan_sandbox(asked, labelling, RULES)
    context = pod.context(PodId("p"), asked, Layout(Path("/r"), Path("/s")), labelling, "s0:c1,c2")
    assert context.selinux == Label("u:r:mine_t:s0:c1,c2", "u:object_r:container_file_t:s0:c1,c2")
    assert pod.context(PodId("p"), _config(), Layout(Path("/r"), Path("/s")), NODE, "").selinux is None
    with pytest.raises(FailedPrecondition, match="policy has no contexts for containers"):
        pod.plan_sandbox(asked, dataclasses.replace(NODE, selinux=True), RULES)


def test_context_paths_follow_from_the_id() -> None:
    layout = Layout(Path("/r"), Path("/s"))
    context = pod.context(PodId("p"), _config(linux=_namespaces(pid=pb.CONTAINER, ipc=pb.NODE)), layout, NODE, "")
    assert (context.net, context.ipc, context.pid) == (Path("/s/pods/p/ns/net"), None, None)


def test_name_is_unique_per_attempt() -> None:
    assert pod.pod_name(_config()) == "n_s_u_2"


def test_resolv_conf_is_in_the_order_that_resolvers_read() -> None:
    dns = pb.DNSConfig(servers=["10.10.10.10"], searches=["google.com", "a.b"], options=["ndots:8"])
    assert pod.resolv_conf(dns) == b"search google.com a.b\nnameserver 10.10.10.10\noptions ndots:8\n"


@pytest.mark.parametrize(
    ("config", "error", "field"),
    [
        (_config(log_directory="logs"), InvalidArgument, "log_directory"),
        (_config(hostname="x" * 65), InvalidArgument, "hostname"),
        (_config(hostname="a b"), InvalidArgument, "hostname"),
        (_config(port_mappings=[pb.PortMapping(container_port=70000)]), InvalidArgument, "container_port"),
        (_config(port_mappings=[pb.PortMapping(host_ip="nowhere")]), InvalidArgument, "host_ip"),
        (_config(windows=pb.WindowsPodSandboxConfig()), InvalidArgument, "windows"),
        (_config(linux=_namespaces(pid=pb.TARGET)), InvalidArgument, "TARGET"),
        (_config(linux=_namespaces(network=pb.CONTAINER)), InvalidArgument, "share network and ipc"),
        (_config(linux=_namespaces(ipc=pb.CONTAINER)), InvalidArgument, "share network and ipc"),
        (_config(linux=_userns(mode=pb.CONTAINER)), InvalidArgument, r"userns_options\.mode: CONTAINER"),
        (_config(linux=_userns(mode=pb.TARGET)), InvalidArgument, r"userns_options\.mode: TARGET"),
        (_config(linux=_userns(mode=pb.NODE, uids=[TEN])), InvalidArgument, "NODE has no mappings"),
        (_config(linux=_userns()), InvalidArgument, r"userns_options\.uids: exactly one"),
        (_config(linux=_userns(uids=[TEN])), InvalidArgument, r"userns_options\.gids: exactly one"),
        (_config(linux=_userns(uids=[TEN, TEN], gids=[TEN])), InvalidArgument, r"uids: .* there are 2"),
        (_config(linux=_userns(uids=[TEN], gids=[_ids(container_id=1)])), InvalidArgument, "gids: .* id 0"),
        (_config(linux=_userns(uids=[_ids(length=0)], gids=[TEN])), InvalidArgument, "uids: .* id 0"),
        (_config(linux=_userns(uids=[_ids(host_id=2**32 - 10)], gids=[TEN])), InvalidArgument, "more than the host"),
        (_config(linux=_mapped(pid=pb.NODE)), InvalidArgument, "namespace_options.pid: NODE"),
        (_config(linux=_mapped(ipc=pb.NODE)), InvalidArgument, "namespace_options.ipc: NODE"),
        (_config(linux=_linux(selinux_options=pb.SELinuxOption(level="s0"))), FailedPrecondition, "selinux_options"),
        (_config(linux=pb.LinuxPodSandboxConfig(sysctls={"kernel.panic": "1"})), InvalidArgument, "not namespaced"),
        (_config(linux=pb.LinuxPodSandboxConfig(sysctls={"net/../kernel/x": "1"})), InvalidArgument, "sysctl"),
        (_config(dns_config=pb.DNSConfig(servers=["1.1.1.1\nevil"])), InvalidArgument, "dns_config.servers"),
    ],
)
def test_refusals_name_the_field(config: pb.PodSandboxConfig, error: type[CriShimError], field: str) -> None:
    with pytest.raises(error, match=field):
        pod.plan_sandbox(config, NODE, RULES)


def test_a_user_namespace() -> None:
    highest = _ids(host_id=2**32 - 11)
    linux = _userns(uids=[highest], gids=[_ids(length=3)])
    plan = pod.plan_sandbox(_config(linux=linux), NODE, RULES)
    assert plan.user == UserNamespace(IdRange(2**32 - 11, 10), IdRange(1000, 3))
    assert plan.sysctls["net.ipv4.ping_group_range"] == "0 2"
    assert (plan.user.uids.on_host(9), plan.user.uids.on_host(10)) == (2**32 - 2, 65534)
    context = pod.context(PodId("p"), _config(linux=linux), Layout(Path("/r"), Path("/s")), NODE, "")
    assert (context.user, context.ids) == (Path("/s/pods/p/ns/user"), plan.user)
    of_node = pod.plan_sandbox(_config(linux=_mapped(network=pb.NODE)), NODE, RULES)
    assert (of_node.user is None, of_node.net, of_node.ipc, of_node.uts) == (False, False, True, False)
    none = pod.plan_sandbox(_config(linux=_userns(mode=pb.NODE)), NODE, RULES)
    assert (none.user, none.sysctls["net.ipv4.ping_group_range"]) == (None, "0 2147483647")


@pytest.mark.parametrize("name", ["", "a/b", "x" * 254, "a\nb"])
def test_bad_names(name: str) -> None:
    config = _config()
    config.metadata.name = name
    with pytest.raises(InvalidArgument, match=r"metadata\.name"):
        pod.pod_name(config)


def test_host_sysctls_need_own_namespaces() -> None:
    linux = _namespaces(network=pb.NODE)
    linux.sysctls["net.ipv4.ip_forward"] = "1"
    with pytest.raises(InvalidArgument, match="network namespace"):
        pod.plan_sandbox(_config(linux=linux), NODE, RULES)


def test_without_root_only_the_nodes_network() -> None:
    laptop = NodeFacts(hostname="h", boot_id="b", root=False)
    with pytest.raises(FailedPrecondition, match="NODE"):
        pod.plan_sandbox(_config(), laptop, RULES)
    pod.plan_sandbox(_config(linux=_namespaces(network=pb.NODE)), laptop, RULES)


@pytest.mark.parametrize("path", ["../x.log", "/etc/passwd", "a/../../x", "."])
def test_logs_stay_in_their_directory(path: str) -> None:
    with pytest.raises(InvalidArgument, match="log_path"):
        container_request.log_path("/var/log/pods/p", path)


def test_log_paths() -> None:
    assert container_request.log_path("/l", "c/0.log") == "/l/c/0.log"
    assert container_request.log_path("", "c.log") == ""
    assert container_request.log_path("/l", "") == ""


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        (pb.Mount(container_path="rel", host_path="/h"), "container_path"),
        (pb.Mount(container_path="/c"), "neither host_path nor image"),
        (pb.Mount(container_path="/c", host_path="rel"), "host_path"),
        (pb.Mount(container_path="/c" + "x" * 5000, host_path="/h"), "name of 5001 bytes"),
        (pb.Mount(container_path="/c", host_path="/h" * 3000), "6000 bytes long"),
    ],
)
def test_bad_mounts(mount: pb.Mount, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        container_request.check(pb.ContainerConfig(mounts=[mount]), _config())
