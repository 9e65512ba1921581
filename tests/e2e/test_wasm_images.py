"""The forms in which images bring modules: layer types, a file system beside a module, text, names of functions."""

from __future__ import annotations

import grpc
import pytest

from tests.e2e.conftest import Lab
from tests.support import images
from tests.support import wasm as guests
from tests.support.cri import container_config
from tests.support.expect import refused

pytestmark = pytest.mark.root

MODULE = guests.assemble(guests.HELLO)
FILES = images.layer([images.directory("etc"), images.file("etc/motd", b"of the layer\n")])


def pulled(lab: Lab, registry: images.Registry, name: str, image: images.Image) -> str:
    reference = registry.push(f"forms/{name}:1", image)
    lab.cri.pull(reference)
    return reference


@pytest.mark.parametrize(
    "layer_type",
    [
        "application/wasm",
        "application/vnd.wasm.content.layer.v1+wasm",
        "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
    ],
)
@pytest.mark.parametrize("architecture", ["wasm", images.ARCHITECTURE])
def test_layer_types(shared_lab: Lab, registry: images.Registry, layer_type: str, architecture: str) -> None:
    lab = shared_lab
    platform = "wasi" if architecture == "wasm" else "linux"
    made = images.image([images.Blob(MODULE, layer_type)], os=platform, architecture=architecture)
    name = f"{layer_type.rpartition('/')[2].replace('+', '-')}-{architecture}"
    for handler in ("wasm", "crun"):
        container = lab.cri.run(lab.pod(handler), container_config(pulled(lab, registry, name, made)))
        assert lab.cri.wait_exit(container).exit_code == 0
        assert [line.text for line in lab.cri.log(container)] == ["hello from wasm"]


def test_a_module_beside_a_file_system(shared_lab: Lab, registry: images.Registry) -> None:
    lab = shared_lab
    module = images.Blob(guests.assemble(guests.prints_file(3, "etc/motd")), images.WASM_LAYER)
    reference = pulled(lab, registry, "beside", images.image([FILES, module], os="wasi", architecture="wasm"))
    container = lab.cri.run(lab.pod("wasm"), container_config(reference))
    assert lab.cri.wait_exit(container).exit_code == 0
    assert [line.text for line in lab.cri.log(container)] == ["of the layer"]


def test_two_modules_are_one_too_many(shared_lab: Lab, registry: images.Registry) -> None:
    blobs = [images.Blob(guests.assemble(text), images.WASM_LAYER) for text in (guests.HELLO, guests.SLEEP)]
    reference = registry.push("forms/two:1", images.image(blobs, os="wasi", architecture="wasm"))
    with refused(grpc.StatusCode.UNKNOWN, "2 Wasm layers, a container runs exactly one"):
        shared_lab.cri.pull(reference)


@pytest.mark.parametrize("handler", ["wasm", "crun"])
@pytest.mark.parametrize("words", [["app.wat#serve"], ["/app/app.wat#serve"]])
def test_text_and_a_function_of_it(shared_lab: Lab, registry: images.Registry, handler: str, words: list[str]) -> None:
    lab = shared_lab
    text = images.file("app/app.wat", b";; a library\n" + guests.LIBRARY.encode())
    layer = images.layer([images.directory("app"), text])
    made = images.image([*images.busybox_image().blobs[1:], layer], {"WorkingDir": "/app"})
    container = lab.cri.run(lab.pod(handler), container_config(pulled(lab, registry, "text", made), *words))
    assert lab.cri.wait_exit(container).exit_code == 0
    assert [line.text for line in lab.cri.log(container)] == ["initialised"]
