"""Random requests in random sequences: the daemon answers each with a named outcome, and keeps nothing of any of them.

Not that an answer is right: other tests know that. Requests are made from the descriptors (`tests.support.arbitrary`),
most of them close to good ones, so that they get past the first checks and into the runtimes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support.arbitrary import Pools, changed
from tests.support.cri import container_config, fault
from tests.support.daemon import Daemon
from tests.support.expect import eventually
from tests.support.fields import leaves
from tests.support.scale import count
from tests.support.world import settle, unchanged

pytestmark = pytest.mark.root

REQUESTS = 25
"""In one sequence, on one set of pods and containers."""
ANSWER_SECONDS = 60
STREAM_SECONDS = 0.2
"""How long a stream is listened to: one of events has no end."""

SLOTS = 4
"""How many of the pods and containers of a sequence its later requests can name."""
SHORT = 12

Code = grpc.StatusCode
CODES = {
    *(Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.FAILED_PRECONDITION, Code.UNIMPLEMENTED),
    Code.RESOURCE_EXHAUSTED,
}
"""What may be said of a bad request, whichever."""
WAITED = {Code.DEADLINE_EXCEEDED}
ALLOWED = {
    "PullImage": {Code.UNKNOWN},  # the kubelet shows the bare message of this code (contract of the kubelet)
    "PodSandboxStats": {Code.UNAVAILABLE},  # of a pod that is not ready
    "ExecSync": {Code.DEADLINE_EXCEEDED},  # of the request itself
}

METHODS = {method.name: method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods}
OFTEN = (  # what leads to containers, and every other RPC now and then
    *("RunPodSandbox", "CreateContainer", "StartContainer", "ExecSync", "UpdateContainerResources") * 4,
    *("StopContainer", "RemoveContainer", "StopPodSandbox", "PullImage", "ContainerStats") * 2,
    *METHODS,
)
UNTIL_TERM = "trap exit TERM; while :; do sleep 0.1; done"
NAMES_A_PLACE = ("path", "directory", "location", "parent", "localhost_ref", "_dir")


@dataclass(slots=True)
class Client:
    """Sends the requests of one sequence as bytes, and holds every answer to what may be answered."""

    channel: grpc.Channel
    made: dict[str, list[str]] = field(default_factory=lambda: {"pod": [], "con": []})

    def send(self, rpc: str, request: Message) -> None:
        method = METHODS[rpc]
        try:
            answer = self._answer(method, request)
        except grpc.RpcError as error:
            code, words = fault(error)
            allowed = ALLOWED.get(rpc, set()) | (WAITED if method.server_streaming else set())
            assert code in CODES | allowed, f"{rpc}: {code.name}: {words}\n{request}"
            assert words, f"{rpc}: {code.name} without a word"
        else:
            if isinstance(answer, pb.RunPodSandboxResponse):
                self.made["pod"].append(answer.pod_sandbox_id)
            elif isinstance(answer, pb.CreateContainerResponse):
                self.made["con"].append(answer.container_id)

    def _answer(self, method: MethodDescriptor, request: Message) -> Message | None:
        path = f"/{method.containing_service.full_name}/{method.name}"
        kind = GetMessageClass(method.output_type)
        body = self._with_ids(request.SerializeToString())
        if method.server_streaming:
            stream: grpc.UnaryStreamMultiCallable[bytes, bytes] = self.channel.unary_stream(path)
            call = stream(body, timeout=STREAM_SECONDS)
            return next((kind.FromString(answer) for answer in call), None)
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(path)
        return kind.FromString(unary(body, timeout=ANSWER_SECONDS))

    def _with_ids(self, body: bytes) -> bytes:
        """Ids that stand for "one of the last that were made" become real ones, which are as long."""
        for what, ids in self.made.items():
            for number in range(SLOTS if ids else 0):
                made = ids[-1 - number % len(ids)]
                for length in (64, SHORT):
                    body = body.replace(_id(what, number)[:length].encode(), made[:length].encode())
        return body


def _id(what: str, number: int) -> str:
    return f"{what}{number}" * 16


@dataclass(frozen=True, slots=True)
class Good:
    """Requests that could be right, about things that there may be."""

    daemon: Daemon
    busybox: str
    wasm: str

    def request(self, draw: st.DrawFn, rpc: str) -> Message:
        request = GetMessageClass(METHODS[rpc].input_type)()
        for name, what in (("pod_sandbox_id", "pod"), ("container_id", "con")):
            if name in request.DESCRIPTOR.fields_by_name:
                setattr(request, name, _id(what, draw(st.integers(0, SLOTS - 1))))
        if isinstance(request, pb.RunPodSandboxRequest):
            request.CopyFrom(self._pod(draw))
        elif isinstance(request, pb.CreateContainerRequest):
            request.config.CopyFrom(self._container(draw))
        elif isinstance(request, pb.ExecSyncRequest):
            request.cmd.append("true")
        return request

    def _pod(self, draw: st.DrawFn) -> pb.RunPodSandboxRequest:
        modes = st.sampled_from([pb.POD, pb.NODE])
        config = self.daemon.pod_config(f"p{draw(st.integers(0, 2))}", network=draw(modes), pid=draw(modes))
        config.linux.security_context.privileged = draw(st.booleans())
        return pb.RunPodSandboxRequest(
            config=config, runtime_handler=draw(st.sampled_from(["", "runc", "crun", "wasm"]))
        )

    def _container(self, draw: st.DrawFn) -> pb.ContainerConfig:
        linux = draw(st.integers(0, 2))
        command = ["sh", "-c", UNTIL_TERM] if linux else []
        return container_config(
            self.busybox if linux else self.wasm, *command, name=f"c{draw(st.integers(0, 3))}", pid=pb.CONTAINER
        )

    def names(self) -> Pools:
        unknown = ["", "ab" * 32, "zz", "../x", "a" * 63]
        ids = {what: [_id(what, n)[:length] for n in range(SLOTS) for length in (64, SHORT)] for what in ("pod", "con")}
        images = [self.busybox, self.busybox, self.wasm, "", "no/such:1", "up/CASE", "127.0.0.1:1/none"]
        return {
            "pod_sandbox_id": [*ids["pod"], *unknown],
            "container_id": [*ids["con"], *unknown],
            "container_ids": [*ids["con"], *unknown],
            "target_id": [*ids["con"], *unknown],
            "id": [*ids["pod"], *ids["con"], *unknown],
            "image": images,
        }


@st.composite
def requests(draw: st.DrawFn, good: Good, pools: Pools) -> tuple[str, Message]:
    """An RPC and a request for it: mostly a good one with a few other values, sometimes nothing but such values."""
    rpc = draw(st.sampled_from(OFTEN))
    if draw(st.integers(0, 4)):
        return rpc, draw(changed(good.request(draw, rpc), pools, 3, {"windows", "sandbox_config"}))
    return rpc, draw(changed(GetMessageClass(METHODS[rpc].input_type)(), pools, 12))


@st.composite
def sequences(draw: st.DrawFn, good: Good, pools: Pools) -> list[tuple[str, Message]]:
    """A pod with a container that runs, and requests to go on with."""
    begin = [(rpc, good.request(draw, rpc)) for rpc in ("RunPodSandbox", "CreateContainer", "StartContainer")]
    return [*begin, *(draw(requests(good, pools)) for _ in range(REQUESTS))]


_COMMANDS = [
    *("true", "sh", "sleep", "0.05", "-c", "exit 3", "echo hello", "cat"),
    *("/no/such", "/etc", "", "x" * 300, "a\0b"),
]
POOLS: Pools = {
    "command": _COMMANDS,
    "args": _COMMANDS,
    "cmd": _COMMANDS,
    # Seconds: nothing here runs for long, but a grace is waited for when the process cannot be told.
    "timeout": [0, 0, 1, -1, -(1 << 63)],
    "runtime_handler": ["", "runc", "crun", "wasm", "no-such", "../crun"],
    "annotations": [
        *("a", "cri-shim.io/handler.main", "cri-shim.io/isolation", "cri-shim.io/listen", "cri-shim.io/x"),
        *("run.oci.handler", "module.wasm.image/variant", "cdi.k8s.io/x", "kubernetes.io/ingress-bandwidth"),
    ],
    "annotations=": ["", "wasm", "runc", "compat", "process", "8080", "10M", "vendor.example/class=one", "x" * 300],
    "sysctls": ["net.ipv4.ip_forward", "kernel.shm_rmid_forced", "fs.mqueue.msg_max", "kernel.panic", "net/../x", "x"],
    "unified": ["memory.high", "cpu.weight", "memory/../x", "x", ""],
    "add_capabilities": ["ALL", "NET_ADMIN", "CAP_NET_RAW", "SYS_ADMIN", "FLY", ""],
    "drop_capabilities": ["ALL", "NET_RAW", "FLY", ""],
    "add_ambient_capabilities": ["ALL", "NET_BIND_SERVICE", "FLY", ""],
    "mount_options": ["noexec", "nosuid", "noatime", "relatime", "rw", "bind", ""],
    "permissions": ["r", "rw", "rwm", "x", ""],
    "page_size": ["2MB", "1GB", "3KB", ""],
    "server_address": ["", "127.0.0.1", "registry.example"],
    "image_ref": ["", "sha256:" + "ab" * 32],
}


def _places(scratch: Path, cgroup_parent: str) -> Pools:
    """Paths and cgroups: of this test, or such that nothing can be made there."""
    here = [str(scratch), f"{scratch}/new", f"{scratch}/new/deep", f"{scratch}/./file", f"{scratch}/link"]
    odd = [f"{scratch}/{name}" for name in ("x" * 300, "a\0b", "é\n")]
    wrong = ["", "relative", "/proc/none", "/etc/passwd/x", *odd]
    inside = ["/", "/m", "/m/deep", "/etc/hosts", "/dev", "/dev/shm/x", "/proc/x", "/sys", "m", "/m/../..", "", "/é"]
    return {
        "log_directory": [*here, *wrong],
        "host_path": [*here, *wrong, "/proc", "/dev/null", "/dev/zero", "/etc/hostname"],
        "location": [*here, *wrong],
        "output_path": [*here, *wrong],
        "checkpoint_path": [*here, *wrong],
        "localhost_ref": [*here, *wrong, "/dev/zero", "localhost/x"],
        "seccomp_profile_path": ["", "runtime/default", "unconfined", f"localhost/{scratch}/file", "localhost/x", "x"],
        "apparmor_profile": ["", "runtime/default", "unconfined", "localhost/x", "x"],
        "cgroup_parent": [cgroup_parent, f"{cgroup_parent}/..", "/a.slice", "x" * 300],
        "log_path": ["", "x.log", "deep/x.log", "../x.log", "/x.log", "x" * 300, "a\0b", "a/../b.log", ".", "é"],
        "container_path": inside,
        "working_dir": [*inside, "/made"],
        "image_sub_path": ["", "bin", "../x", "/bin", "no"],
        "masked_paths": inside,
        "readonly_paths": inside,
    }


@pytest.fixture(scope="module")
def channel(shared_daemon: Daemon) -> Iterator[grpc.Channel]:
    options = [("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"unix:{shared_daemon.socket}", options) as channel:
        yield channel


def test_every_place_that_a_request_can_name_is_one_of_the_tests(tmp_path: Path) -> None:
    pools = {*POOLS, *_places(tmp_path, "/x")}
    texts = {
        path[-1].name
        for method in METHODS.values()
        for path in leaves(method.input_type)
        if path[-1].type == FieldDescriptor.TYPE_STRING
    }
    assert {name for name in texts if any(word in name for word in NAMES_A_PLACE)} <= pools


@pytest.mark.timeout(3600)
def test_no_request_breaks_the_daemon_or_leaves_anything(
    shared_lab: Lab, channel: grpc.Channel, tmp_path: Path
) -> None:
    lab, daemon = shared_lab, shared_lab.daemon
    settle(daemon, {"runc": lab.busybox, "crun": lab.busybox, "wasm": lab.wasm})
    pid, descriptors = daemon.pid, _descriptors(daemon)
    scratch = tmp_path / "s"
    good = Good(daemon, lab.busybox, lab.wasm)
    pools = {**POOLS, **_places(scratch, daemon.cgroup_parent), **good.names()}

    @settings(
        max_examples=count(full=10_000, quick=150) // REQUESTS,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a shorter sequence would meet another daemon: this one has lived on
        suppress_health_check=list(HealthCheck),
    )
    @given(sequences(good, pools))
    def send(sequence: list[tuple[str, Message]]) -> None:
        with unchanged(daemon):
            client = Client(channel)
            scratch.mkdir(exist_ok=True)
            (scratch / "file").write_text("{}")
            (scratch / "link").unlink(missing_ok=True)
            (scratch / "link").symlink_to("file")
            lab.cri.pull(lab.busybox)
            lab.cri.pull(lab.wasm)
            for rpc, request in sequence:
                client.send(rpc, request)
            _clear(lab)
            shutil.rmtree(scratch)

    _clear(lab)
    send()
    assert (daemon.is_running, daemon.pid) == (True, pid)
    assert "Traceback" not in daemon.log.read_text()
    eventually(lambda: _descriptors(daemon) <= descriptors + 4)


def _clear(lab: Lab) -> None:
    """No pod and no image: what is there then is there for ever."""
    lab.cri.remove_all_pods()
    for image in lab.cri.images.ListImages(pb.ListImagesRequest()).images:
        lab.cri.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=image.id)))


def _descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))
