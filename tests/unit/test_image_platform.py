"""Linux or Wasm: by the handler of the request, else of its pod, else the default one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.adapters.content import Content
from cri_shim.adapters.store import Store
from cri_shim.flows.handlers import Handlers
from cri_shim.flows.image_platform import ImagePlatforms
from cri_shim.model.errors import NotFound
from cri_shim.model.handler import Kind
from cri_shim.model.ids import Digest, ImageId, PodId
from cri_shim.model.image import ImageConfig, ImageRecord, Platform
from cri_shim.model.layout import Layout
from cri_shim.model.pod import PodRecord
from cri_shim.pb import api_pb2 as pb
from cri_shim.spec.dispatch import HandlerRules
from cri_shim.spec.pod import pod_name
from cri_shim.wire.oci_image import host_platforms

RULES = {"runc": HandlerRules("runc", Kind.LINUX), "wasm": HandlerRules("wasm", Kind.WASM)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "state.db")
    yield opened
    opened.close()


def pod(name: str) -> pb.PodSandboxConfig:
    return pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name=name, namespace="n", uid="u"))


def platforms_of(store: Store, default: str) -> ImagePlatforms:
    content = Content(Layout(Path("/root"), Path("/state")))
    return ImagePlatforms(Handlers({}, RULES, default), store.pods, store.images, content, host_platforms("x86_64"))


@pytest.mark.parametrize("default", ["runc", "wasm"])
async def test_what_a_pull_means(store: Store, default: str) -> None:
    for number, handler in enumerate(("runc", "wasm", "gone")):
        record = PodRecord(
            id=PodId(str(number)),
            name=pod_name(pod(handler)),
            config=b"",
            runtime_handler=handler,
            handler=handler,
            created_at=1,
        )
        await store.pods.put(record)
    platforms = platforms_of(store, default)

    def of(handler: str, config: pb.PodSandboxConfig | None = None) -> bool:
        spec = pb.ImageSpec(image="x", runtime_handler=handler)
        return platforms.of_pull(pb.PullImageRequest(image=spec, sandbox_config=config))

    assert (of("runc"), of("wasm")) == (False, True)
    assert (of("", pod("runc")), of("", pod("wasm"))) == (False, True)
    assert of("runc", pod("wasm")) is False
    for nobody in (None, pod("other"), pod("gone"), pb.PodSandboxConfig()):
        assert of("", nobody) == (default == "wasm")
    with pytest.raises(NotFound, match="no-such"):
        of("no-such")


def test_the_one_that_fits_is_picked(store: Store) -> None:
    platforms = platforms_of(store, "wasm")
    linux, wasm = (
        ImageRecord(ImageId(name), Digest(name), None, Digest(name), 1, platform, ImageConfig(), 1)
        for name, platform in (("l", Platform("linux", "amd64")), ("w", Platform("wasi", "wasm")))
    )
    assert platforms.pick((linux, wasm), "wasm") is wasm
    assert platforms.pick((wasm, linux), "runc") is linux
    assert platforms.pick((linux, wasm), "") is wasm
    assert platforms.pick((wasm,), "runc") is wasm
    assert platforms.pick((wasm, linux), "no-such") is linux
