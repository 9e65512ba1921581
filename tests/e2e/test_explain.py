"""`cri-shim explain` says before what happens then: held against containers that are made from the same images."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import grpc
import pytest

from cri_shim.pb import api_pb2 as pb
from tests.e2e.conftest import Lab
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import container_config, fault
from tests.support.daemon import PROGRAM

pytestmark = pytest.mark.root

VARIANT = "module.wasm.image/variant"


def explain(lab: Lab, *words: str) -> tuple[int, dict[str, str], str]:
    """Status, the lines by their first word, and what was said on stderr."""
    argv = [str(PROGRAM), "explain", "--listen", str(lab.daemon.socket), *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, dict(line.split(maxsplit=1) for line in done.stdout.splitlines()), done.stderr


def decided(lab: Lab, image: str, handler: str, annotations: dict[str, str]) -> str:
    """What the daemon decides when such a container is made."""
    config = lab.pod_config()
    config.annotations.update(annotations)
    pod = lab.pod(handler, config=config)
    try:
        container = lab.cri.create(pod, container_config(image))
    except grpc.RpcError as error:
        return f"refused: {fault(error)[1]}"
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    info = json.loads(lab.cri.runtime.ContainerStatus(request).info["info"])
    return f"handler {info['handler']}: {info['handlerReason']}"


@pytest.mark.parametrize("annotation", [{}, {VARIANT: "compat"}, {"cri-shim.io/handler.main": "wasm"}])
@pytest.mark.parametrize("handler", ["", "crun", "wasm"])
@pytest.mark.parametrize("kind", ["linux", "artifact", "module in an image"])
def test_it_is_what_happens(
    shared_lab: Lab, registry: images.Registry, kind: str, handler: str, annotation: dict[str, str]
) -> None:
    lab = shared_lab
    image = {"linux": lab.busybox, "artifact": lab.wasm}.get(kind)
    if image is None:
        layers = [
            images.layer([images.directory("bin")]),
            images.layer([images.file("app", guests.assemble(guests.HELLO))]),
        ]
        image = registry.push("explain/app:1", images.image(layers, {"Entrypoint": ["/app"]}))
        lab.cri.pull(image)
    before = Path("/proc/self/mountinfo").read_text()
    words = [f"--annotation={key}={value}" for key, value in annotation.items()]
    status, said, _ = explain(lab, image, f"--runtime-handler={handler}", *words)
    assert Path("/proc/self/mountinfo").read_text() == before
    assert said["container"] == decided(lab, image, handler, annotation)
    assert status == said["container"].startswith("refused: ")


def test_what_it_shows(shared_lab: Lab) -> None:
    lab = shared_lab
    status, said, _ = explain(lab, "--runtime-handler=wasm", lab.busybox, "--", "/bin/sh", "-c", "true")
    assert (status, said["command"], said["entrypoint"], said["pod"]) == (
        0,
        "/bin/sh -c true",
        "an ELF binary",
        "handler wasm",
    )
    status, said, _ = explain(lab, lab.busybox, "gone")
    assert (status, said["entrypoint"]) == (0, "not found in the image")
    _, said, _ = explain(lab, "--runtime-handler=wasm", lab.busybox, "gone.wasm")
    assert said["container"] == "handler wasm: the command is named as a Wasm file"
    assert explain(lab, "nothing")[2] == "cri-shim: image 'nothing' is not on this node; pull it first\n"
    assert "no runtime handler 'kata' is configured" in explain(lab, lab.busybox, "--runtime-handler=kata")[2]
    assert "not of the form KEY=VALUE" in explain(lab, lab.busybox, "--annotation", "x")[2]
