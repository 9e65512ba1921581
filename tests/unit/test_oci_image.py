"""Indexes, manifests and configs: what is chosen, what an image is called, what is refused."""

from __future__ import annotations

import json

import pytest

from cri_shim.model.errors import PullError
from cri_shim.model.ids import Digest
from cri_shim.model.image import Platform
from cri_shim.wire.oci_image import (
    Descriptor,
    ImagePlan,
    Index,
    Manifest,
    check_platform,
    choose,
    digest_of,
    host_platforms,
    parse_document,
    plan_image,
)
from tests.support import images

HOST = host_platforms("x86_64")
LAYER = images.layer([images.file("a", b"1")])
PLAIN = images.layer([images.file("b", b"2")], images.TAR)


def manifest_of(image: images.Image) -> Manifest:
    parsed = parse_document(image.manifest.data, image.manifest.media_type)
    assert isinstance(parsed, Manifest)
    return parsed


def plan_of(image: images.Image, entry: Descriptor | None = None) -> ImagePlan:
    return plan_image(manifest_of(image), Digest(image.digest), image.config.data, entry)


def index_of(*platforms: str) -> Index:
    members = {name: images.image([LAYER], {"Cmd": [name]}) for name in platforms}
    parsed = parse_document(images.index(members).manifest.data, images.INDEX)
    assert isinstance(parsed, Index)
    return parsed


def chosen(index: Index, wants_wasm: bool | None = None, machine: str = "x86_64") -> str:
    entry = choose(index, host_platforms(machine), wants_wasm=wants_wasm)
    assert entry.platform is not None
    return entry.platform.parsed().text


@pytest.mark.parametrize(
    ("there", "wants_wasm", "machine", "expected"),
    [
        (("linux/arm64", "linux/amd64"), None, "x86_64", "linux/amd64"),
        (("linux/amd64", "wasi/wasm"), None, "x86_64", "linux/amd64"),
        (("linux/amd64", "wasi/wasm"), True, "x86_64", "wasi/wasm"),
        (("wasip1/wasm", "linux/amd64"), False, "x86_64", "linux/amd64"),
        (("linux/amd64",), True, "x86_64", "linux/amd64"),
        (("linux/s390x", "wasip2/wasm"), False, "x86_64", "wasip2/wasm"),
        (("linux/arm/v5", "linux/arm/v6", "linux/arm/v7"), None, "armv7l", "linux/arm/v7"),
        (("linux/arm/v5", "linux/arm/v6"), None, "armv7l", "linux/arm/v6"),
        (("linux/arm/v7", "linux/arm64/v8"), None, "aarch64", "linux/arm64/v8"),
        (("linux/amd64/v3", "linux/amd64"), None, "x86_64", "linux/amd64"),
        (("unknown/unknown", "linux/amd64"), None, "x86_64", "linux/amd64"),
    ],
)
def test_the_platform_that_fits_is_chosen(
    there: tuple[str, ...], wants_wasm: bool | None, machine: str, expected: str
) -> None:
    assert chosen(index_of(*there), wants_wasm, machine) == expected


def test_when_nothing_fits_the_error_lists_what_there_is() -> None:
    with pytest.raises(PullError, match="linux/amd64 or wasi/wasm, only for: linux/s390x, windows/amd64"):
        chosen(index_of("windows/amd64", "linux/s390x", "unknown/unknown"))


def test_an_image_has_its_chain_ids_and_its_size() -> None:
    plan = plan_of(images.image([LAYER, PLAIN], {"Cmd": ["x"]}))
    first, second = plan.layers
    assert (first.diff_id, first.chain_id) == (LAYER.diff_id, LAYER.diff_id)
    assert second.chain_id == digest_of(f"{LAYER.diff_id} {PLAIN.diff_id}".encode())
    assert plan.size == len(LAYER.data) + len(PLAIN.data) + len(
        images.image([LAYER, PLAIN], {"Cmd": ["x"]}).config.data
    )


def test_the_same_content_has_the_same_id_whatever_wraps_it() -> None:
    one = plan_of(images.image([LAYER], {"Cmd": ["x"]}))
    other = plan_of(images.image([LAYER], {"Cmd": ["x"]}, annotations={"a": "b"}))
    assert one.id == other.id == images.image([LAYER], {"Cmd": ["x"]}).id


def test_the_config_of_a_container_is_read_with_its_nulls() -> None:
    run: dict[str, object] = {
        "User": "1000:7",
        "Entrypoint": None,
        "Cmd": ["a"],
        "Env": None,
        "Volumes": {"/data": {}},
        "Labels": {"k": "v"},
        "StopSignal": "SIGQUIT",
        "WorkingDir": "/w",
        "ExposedPorts": {"80/tcp": {}},
    }
    config = plan_of(images.image([LAYER], run)).config
    assert (config.user, config.entrypoint, config.cmd, config.env) == ("1000:7", (), ("a",), ())
    assert (config.volumes, config.labels, config.stop_signal) == (("/data",), {"k": "v"}, "SIGQUIT")
    assert (config.working_dir, config.exposed_ports) == ("/w", ("80/tcp",))


@pytest.mark.parametrize(
    "layer_type",
    [
        "application/wasm",
        "application/vnd.wasm.content.layer.v1+wasm",
        "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
    ],
)
def test_a_wasm_artifact_is_one_module(layer_type: str) -> None:
    artifact = images.wasm_artifact(b"\0asm", layer_type=layer_type)
    plan = plan_of(artifact)
    assert plan.layers == ()
    assert plan.wasm is not None
    assert plan.wasm.media_type == layer_type
    assert plan.id == artifact.id
    assert plan.platform == Platform("wasip1", "wasm")
    check_platform(plan, HOST)


def test_artifacts_that_share_a_config_have_different_ids() -> None:
    one, other = images.wasm_image(b"\0asm1"), images.wasm_image(b"\0asm2")
    assert one.id == other.id
    assert (plan_of(one).id, plan_of(other).id) == (one.digest, other.digest)


def test_a_module_beside_a_file_system() -> None:
    module = images.Blob(b"\0asm", images.WASM_LAYER, images.digest(b"\0asm"))
    mixed = images.image([LAYER, module], os="wasip1", architecture="wasm")
    plan = plan_of(mixed)
    assert [layer.diff_id for layer in plan.layers] == [LAYER.diff_id]
    assert plan.wasm is not None


def test_annotations_of_the_manifest_win_over_those_of_the_index() -> None:
    image = images.image([LAYER], annotations={"a": "manifest", "b": "1"})
    entry = Descriptor(image.digest, 1, annotations={"a": "index", "c": "2"})
    assert plan_of(image, entry).annotations == {"a": "manifest", "b": "1", "c": "2"}


def test_an_image_for_another_machine_is_refused() -> None:
    with pytest.raises(PullError, match="is for linux/s390x, this node runs linux/amd64"):
        check_platform(plan_of(images.image([LAYER], architecture="s390x")), HOST)
    check_platform(plan_of(images.image([LAYER], os="", architecture="")), HOST)


@pytest.mark.parametrize(
    ("media_type", "reason"),
    [
        (f"{images.TAR_GZIP}+encrypted", "encrypted"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "foreign"),
        ("text/plain", "not known"),
        ("", "not known"),
    ],
)
def test_a_layer_that_cannot_be_unpacked_is_named(media_type: str, reason: str) -> None:
    blob = images.Blob(LAYER.data, media_type, LAYER.diff_id)
    with pytest.raises(PullError, match=reason) as caught:
        plan_of(images.image([blob]))
    assert blob.digest in str(caught.value)


def document(**fields: object) -> bytes:
    return json.dumps({"schemaVersion": 2, **fields}).encode()


CONFIG = {"mediaType": images.CONFIG, "digest": LAYER.digest, "size": 2}


@pytest.mark.parametrize(
    ("body", "media_type", "reason"),
    [
        (b"<html>", images.MANIFEST, "malformed"),
        (b"[]", images.MANIFEST, "malformed"),
        (b"\xff", images.MANIFEST, "malformed"),
        (document(), images.MANIFEST, "is none"),
        (b'{"schemaVersion": 1, "fsLayers": []}', "", "schema 1"),
        (b"{}", "application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
        (document(layers=[]), images.MANIFEST, "malformed"),
        (document(config=CONFIG, layers=[{**CONFIG, "digest": "md5:1"}]), images.MANIFEST, "digest in the manifest"),
        (document(config={**CONFIG, "size": -1}, layers=[]), images.MANIFEST, "size of -1"),
        (document(config=CONFIG, layers=[CONFIG] * 501), images.MANIFEST, "501 layers"),
        (document(manifests=[{**CONFIG, "digest": "../../etc"}]), images.INDEX, "digest in the manifest"),
    ],
)
def test_a_broken_document_is_refused(body: bytes, media_type: str, reason: str) -> None:
    with pytest.raises(PullError, match=reason):
        parse_document(body, media_type)


def test_the_media_type_of_the_document_goes_before_the_header() -> None:
    index = images.index({"linux/amd64": images.image([LAYER])})
    assert isinstance(parse_document(index.manifest.data, "text/plain; charset=utf-8"), Index)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"no", "malformed"),
        (b"{}", "lists 0 layers, the manifest has 1"),
        (b'{"rootfs": {"diff_ids": ["a", "b"]}}', "lists 2 layers"),
        (b'{"rootfs": {"diff_ids": ["a"]}}', "diff ID in the image config"),
        (b'{"config": {"Env": 3}}', "malformed"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config: bytes, reason: str) -> None:
    image = images.image([LAYER])
    with pytest.raises(PullError, match=reason):
        plan_image(manifest_of(image), Digest(image.digest), config, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"Cmd": ["a", "b\0"]},
        {"Env": ["A=\0"]},
        {"WorkingDir": "/\0"},
        {"User": "\0"},
        {"Volumes": {"/\0": {}}},
        {"Entrypoint": ["\0"]},
        {"StopSignal": "\0"},
    ],
)
def test_a_nul_is_refused_where_it_would_be_the_end(settings: dict[str, object]) -> None:
    with pytest.raises(PullError, match="the image config has a NUL character in"):
        plan_of(images.image([LAYER], settings))


def test_what_is_of_an_unknown_type_beside_a_module_is_left_aside() -> None:
    module = images.Blob(b"\0asm", images.WASM_LAYER, images.digest(b"\0asm"))
    other = images.Blob(b"[settings]", "application/toml", images.digest(b"[settings]"))
    plan = plan_of(images.image([other, module, LAYER], os="wasi", architecture="wasm"))
    assert plan.wasm is not None
    assert plan.wasm.digest == module.digest
    assert [layer.diff_id for layer in plan.layers] == [LAYER.diff_id]
    secret = images.Blob(LAYER.data, f"{images.TAR_GZIP}+encrypted", LAYER.diff_id)
    with pytest.raises(PullError, match="encrypted"):
        plan_of(images.image([module, secret], os="wasi", architecture="wasm"))


def test_two_modules_are_one_too_many() -> None:
    blobs = [images.Blob(data, images.WASM_LAYER) for data in (b"1", b"2")]
    with pytest.raises(PullError, match="2 Wasm layers"):
        plan_of(images.image(blobs, os="wasi", architecture="wasm"))
