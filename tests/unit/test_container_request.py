"""A container's request: which of its annotations the runtime sees, and what becomes of an image's VOLUMEs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cri_shim.model.errors import InvalidArgument
from cri_shim.model.handler import Kind
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.container_request import check, passed_annotations, with_directories, without_taken
from cri_shim.spec.dispatch import DEFAULT_ALLOWED_ANNOTATIONS, Decision, HandlerRules

POD = pb.PodSandboxConfig(annotations={"io.katacontainers.a": "pod", "both": "pod", "listen": "x", "other": "pod"})
CONTAINER = pb.ContainerConfig(annotations={"both": "container", "io.katacontainers.b": "container"})


@pytest.mark.parametrize(
    ("allowed", "passed"),
    [
        ((), {}),
        (("io.katacontainers.*",), {"io.katacontainers.a": "pod", "io.katacontainers.b": "container"}),
        (("both",), {"both": "container"}),
        (("*",), {**POD.annotations, **CONTAINER.annotations}),
    ],
)
def test_the_runtime_sees_what_the_handler_lets_through(allowed: tuple[str, ...], passed: Mapping[str, str]) -> None:
    rules = HandlerRules("kata", Kind.LINUX, allowed_annotations=allowed)
    assert passed_annotations(CONTAINER, POD, rules, Decision("kata", wasm=False, reason="")) == passed


def test_a_runtime_that_runs_wasm_itself_is_told_to() -> None:
    rules = HandlerRules("crun", Kind.LINUX, allowed_annotations=DEFAULT_ALLOWED_ANNOTATIONS)
    for handler, told in (("crun", {"run.oci.handler": "wasm"}), ("wasm", {})):
        config, pod = pb.ContainerConfig(), pb.PodSandboxConfig()
        assert passed_annotations(config, pod, rules, Decision(handler, wasm=True, reason="")) == told


def test_a_linux_container_of_a_wasm_pod_is_not_given_to_the_engine() -> None:
    rules = HandlerRules("crun", Kind.LINUX, allowed_annotations=("run.oci.handler",))
    for word, told in (("wasm", {}), ("krun", {"run.oci.handler": "krun"})):
        pod = pb.PodSandboxConfig(annotations={"run.oci.handler": word})
        assert passed_annotations(pb.ContainerConfig(), pod, rules, Decision("crun", wasm=False, reason="")) == told


def test_volumes_of_an_image_where_something_else_belongs() -> None:
    places = ("/data", "/", "/proc", "/proc/x", "/dev/shm", "/sys", "/etc/hosts", "/etc", "/process", "/mine")
    assert without_taken(places, {"/mine", "/other"}) == ("/data", "/etc", "/process")


def test_volumes_of_an_image_come_before_the_mounts_of_the_request() -> None:
    config = pb.ContainerConfig(mounts=[pb.Mount(container_path="/a", host_path="/h", readonly=True)])
    extended = with_directories(config, {"/v": Path("/volumes/0")})
    volume = pb.Mount(container_path="/v", host_path="/volumes/0", selinux_relabel=True)
    assert list(extended.mounts) == [volume, *config.mounts]
    assert len(config.mounts) == 1


@pytest.mark.parametrize("field", ["network", "ipc"])
@pytest.mark.parametrize("of_pod", [pb.NamespaceMode.POD, pb.NamespaceMode.NODE])
@pytest.mark.parametrize("own", pb.NamespaceMode.values())
def test_network_and_ipc_are_those_of_the_pod(
    field: str, of_pod: pb.NamespaceMode.ValueType, own: pb.NamespaceMode.ValueType
) -> None:
    config, pod = pb.ContainerConfig(), pb.PodSandboxConfig()
    setattr(config.linux.security_context.namespace_options, field, own)
    setattr(pod.linux.security_context.namespace_options, field, of_pod)
    if own in {pb.NamespaceMode.POD, of_pod}:
        check(config, pod)
    else:
        with pytest.raises(InvalidArgument, match=f"{field}: {pb.NamespaceMode.Name(own)}, but the pod sandbox has"):
            check(config, pod)
