"""Requests that are wrong: each is refused with a code and a name, and leaves nothing.

Requests are given as text protos: what differs from a good one. What is wrong with images is in `test_bad_images`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import grpc
import pytest
from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from cri_shim.pb import api_pb2 as pb
from tests.e2e.bad_requests import (
    CONTAINER_REQUESTS,
    INVALID,
    LATER,
    MISSING,
    NO_ID,
    POD_REQUESTS,
    RUNTIME_REFUSALS,
    TAKEN,
    UNMET,
    cases,
)
from tests.support.cri import Cri, Pod, container_config, fault
from tests.support.daemon import Daemon
from tests.support.expect import refused
from tests.support.fields import is_map, leaves, name_of, put
from tests.support.world import settle, unchanged

pytestmark = pytest.mark.root

M = TypeVar("M", bound=Message)

_serial = itertools.count()


METHODS = {
    method.name: method
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if not method.server_streaming
}


@dataclass(frozen=True, slots=True)
class Site:
    """A daemon with an image and a pod, for requests that leave all of it as it is."""

    daemon: Daemon
    cri: Cri
    channel: grpc.Channel
    pod: Pod
    image: str

    def raw(self, rpc: str) -> Callable[[bytes], bytes]:
        """An RPC that sends and gets bytes."""
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes]
        call = self.channel.unary_unary(f"/{METHODS[rpc].containing_service.full_name}/{rpc}")
        return call

    def implemented(self) -> Iterator[tuple[MethodDescriptor, Callable[[bytes], bytes]]]:
        """Each RPC that the daemon has."""
        for rpc, method in METHODS.items():
            call = self.raw(rpc)
            try:
                call(b"")
            except grpc.RpcError as error:
                if fault(error)[0] is LATER:
                    continue
            yield method, call

    def pod_config(self, text: str = "") -> pb.PodSandboxConfig:
        return _merged(self.daemon.pod_config(network=pb.NODE), text)

    def container_config(self, text: str = "") -> pb.ContainerConfig:
        """Each with a name of its own."""
        return _merged(container_config(self.image, name=f"c{next(_serial)}"), text)


@pytest.fixture(scope="module")
def standing(shared_daemon: Daemon, busybox: str, wasm_hello: str) -> Iterator[Site]:
    """No request of this file may cost a stack trace, not even in the log."""
    with shared_daemon.client() as cri:
        settle(shared_daemon, {"runc": busybox, "crun": busybox, "wasm": wasm_hello})
        pod = cri.run_pod(shared_daemon.pod_config(network=pb.NODE), "crun")
        options = [("grpc.default_authority", "localhost")]
        with grpc.insecure_channel(f"unix:{shared_daemon.socket}", options) as channel:
            yield Site(shared_daemon, cri, channel, pod, busybox)
    assert "Traceback" not in shared_daemon.log.read_text()


@pytest.fixture
def site(standing: Site) -> Iterator[Site]:
    """What a request made that should have made nothing goes, so that it spoils no other test."""
    with unchanged(standing.daemon):
        yield standing
        for container in standing.cri.containers():
            standing.cri.remove(container.id)
        for pod in standing.cri.pods():
            if pod.id != standing.pod.id:
                standing.cri.remove_pod(pod.id)


@cases("text, code, words", POD_REQUESTS)
def test_pods_that_cannot_be(site: Site, text: str, code: grpc.StatusCode, words: str) -> None:
    with refused(code, words):
        site.cri.run_pod(site.pod_config(text), "crun")


@pytest.mark.parametrize("sysctl", ["net.ipv4.no_such", "net.ipv4.ip_local_port_range"])
def test_sysctls_that_the_kernel_refuses(site: Site, sysctl: str) -> None:
    config = site.daemon.pod_config()
    config.linux.sysctls[sysctl] = "nonsense"
    with refused(INVALID, sysctl):
        site.cri.run_pod(config, "crun")


@pytest.mark.parametrize("handler", ["no-such", "../crun", "h" * 1000])
def test_unknown_handlers(site: Site, handler: str) -> None:
    with refused(MISSING, "there are: crun, runc, wasm"):
        site.cri.run_pod(site.pod_config(), handler)


@cases("text, code, words", CONTAINER_REQUESTS)
def test_containers_that_cannot_be(site: Site, text: str, code: grpc.StatusCode, words: str) -> None:
    with refused(code, words):
        site.cri.create(site.pod, site.container_config(text))


@cases("text, words", RUNTIME_REFUSALS)
@pytest.mark.parametrize("handler", ["runc", "crun"])
def test_what_only_the_runtime_notices(site: Site, handler: str, text: str, words: str) -> None:
    """It is about the request and the image, not about the node: the runtime's words, and what to do."""
    pod = site.cri.run_pod(site.pod_config(), handler)
    with refused(UNMET, words):
        site.cri.run(pod, site.container_config(text))


def test_no_field_takes_an_unknown_value(site: Site) -> None:
    """proto3 lets any number into an enum, and a NUL into a text."""
    for method, call in site.implemented():
        for path in leaves(method.input_type):
            for value in _bad_values(path[-1]):
                request = GetMessageClass(method.input_type)()
                put(request, path, value)
                with refused(INVALID, f"{name_of(path)}: {value!r}"):
                    call(request.SerializeToString())


@pytest.mark.parametrize("body", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f"], ids=["garbage", "text", "cut"])
def test_bytes_that_are_no_message(site: Site, body: bytes) -> None:
    for method, call in site.implemented():
        try:
            GetMessageClass(method.input_type).FromString(body)
        except DecodeError:
            with refused(INVALID, f"no valid {method.input_type.name}"):
                call(body)


BY_ID = {
    "StopPodSandbox": "pod_sandbox_id",
    "RemovePodSandbox": "pod_sandbox_id",
    "PodSandboxStatus": "pod_sandbox_id",
    "CreateContainer": "pod_sandbox_id",
    "StartContainer": "container_id",
    "StopContainer": "container_id",
    "RemoveContainer": "container_id",
    "ContainerStatus": "container_id",
    "ContainerStats": "container_id",
    "PodSandboxStats": "pod_sandbox_id",
    "ExecSync": "container_id",
    "ReopenContainerLog": "container_id",
}


@pytest.mark.parametrize(("rpc", "field"), BY_ID.items(), ids=list(BY_ID))
def test_ids_that_are_none(site: Site, rpc: str, field: str) -> None:
    kind, call = GetMessageClass(METHODS[rpc].input_type), site.raw(rpc)
    with refused(INVALID, "id is empty"):
        call(kind().SerializeToString())
    for unknown in (NO_ID, "../../etc", "x" * 100_000, "ABCDEF", "é"):
        body = kind(**{field: unknown}).SerializeToString()
        if rpc.startswith(("Stop", "Remove")):
            call(body)
        else:
            with refused(MISSING, "does not exist"):
                call(body)


def test_a_prefix_that_fits_two(site: Site) -> None:
    pods: dict[str, str] = {}
    while (pod := site.cri.run_pod(site.pod_config(), "wasm").id)[0] not in pods:
        pods[pod[0]] = pod
    for call in (site.cri.pod_status, site.cri.stop_pod, site.cri.remove_pod):
        with refused(INVALID, f"'{pod[0]}' is ambiguous"):
            call(pod[0])
    assert {pods[pod[0]], pod} <= {listed.id for listed in site.cri.pods()}


def test_names_that_are_taken(site: Site) -> None:
    config = site.pod_config()
    site.cri.run_pod(config, "crun")
    with refused(TAKEN, "runtime handler 'crun'"):
        site.cri.run_pod(config, "runc")
    container = site.container_config("command: 'true'")
    site.cri.create(site.pod, container)
    with refused(TAKEN, "a different configuration"):
        site.cri.create(site.pod, _merged(container, "tty: true"))


def test_what_is_the_clients_own_has_no_limit(site: Site) -> None:
    config = site.pod_config()
    config.labels["key/" + "k" * 1000] = "v" * 100_000
    config.annotations["a"] = "\0\n\x7f" * 100_000
    pod = site.cri.run_pod(config, "crun")
    assert site.cri.pod_status(pod).labels == config.labels
    assert site.cri.pod_status(pod).annotations == config.annotations


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", INVALID, "cmd is empty"),
        ("cmd: 'true' timeout: -1", INVALID, "timeout -1 is negative"),
        ("cmd: '/no/such'", UNMET, "/no/such"),
        ("cmd: '/etc'", UNMET, "/etc"),
        ("cmd: ''", INVALID, "cmd is empty"),
    ],
    ids=["nothing", "timeout", "missing", "directory", "empty"],
)
@pytest.mark.parametrize("handler", ["runc", "crun"])
def test_commands_that_cannot_run(site: Site, handler: str, text: str, code: grpc.StatusCode, words: str) -> None:
    pod = site.cri.run_pod(site.pod_config(), handler)
    container = site.cri.run(pod, site.container_config("command: 'sleep' command: '1000'"))
    with refused(code, words):
        site.cri.runtime.ExecSync(_merged(pb.ExecSyncRequest(container_id=container), text))
    assert site.cri.exec(container, ["true"]).exit_code == 0
    # The runtime has answered when the kernel refuses: it is the command's own end then.
    huge = site.cri.exec(container, ["sh", "x" * (1 << 18)])
    assert huge.exit_code != 0
    assert b"rgument list too long" in huge.stderr


def test_the_longest_waits(site: Site) -> None:
    longest = (1 << 63) - 1
    container = site.cri.run(
        site.pod,
        site.container_config(
            "command: 'sh' command: '-c' command: 'trap exit TERM; >/ready; while :; do sleep 0.1; done'"
        ),
    )
    until_ready = ["sh", "-c", "until [ -e /ready ]; do sleep 0.1; done"]
    assert (
        site.cri.runtime.ExecSync(pb.ExecSyncRequest(container_id=container, cmd=until_ready, timeout=longest))
        == pb.ExecSyncResponse()
    )
    site.cri.runtime.StopContainer(pb.StopContainerRequest(container_id=container, timeout=longest))
    other = site.cri.run(site.pod, site.container_config("command: 'sleep' command: '1000'"))
    site.cri.runtime.StopContainer(pb.StopContainerRequest(container_id=other, timeout=-longest))
    assert site.cri.status(other).exit_code == 137


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("mounts { container_path: '/m' host_path: '/etc/passwd/x' }", UNMET, "/etc/passwd/x"),
        ("linux { security_context { capabilities { add_capabilities: 'SYS_ADMIN' } } }", INVALID, "add_capabilities"),
        ("devices { host_path: '/dev/null' }", INVALID, "devices"),
        ("linux { resources { memory_limit_in_bytes: -1 } }", INVALID, "memory_limit_in_bytes"),
    ],
    ids=["mount", "capability", "device", "memory"],
)
def test_modules_that_cannot_be(site: Site, wasm_hello: str, text: str, code: grpc.StatusCode, words: str) -> None:
    pod = site.cri.run_pod(site.pod_config(), "wasm")
    with refused(code, words):
        site.cri.create(pod, _merged(container_config(wasm_hello), text))


def _bad_values(field: FieldDescriptor) -> list[object]:
    if field.enum_type is not None:
        return [99]
    is_text = field.type == FieldDescriptor.TYPE_STRING or is_map(field)
    return ["a\0b"] if is_text and field.name not in {"labels", "annotations", "label_selector"} else []


def _merged(message: M, text: str) -> M:
    text_format.Merge(text, message)
    return message
