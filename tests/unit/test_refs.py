"""References: docker's normalisation, and finding an image by whatever names it."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_shim.model.errors import InvalidArgument
from cri_shim.model.ids import Digest, ImageId
from cri_shim.model.image import ImageConfig, ImageRecord, Platform
from cri_shim.model.refs import find_image, find_images, parse_reference

D1, D2 = Digest("sha256:" + "1" * 64), Digest("sha256:" + "12" * 32)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.29-2", "docker.io/library/busybox:1.29-2"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/library/busybox:1", "docker.io/library/busybox:1"),
        ("user/app", "docker.io/user/app:latest"),
        ("quay.io/org/app", "quay.io/org/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("10.0.0.1:5000/a/b/c:v1", "10.0.0.1:5000/a/b/c:v1"),
        ("[::1]:5000/app:1", "[::1]:5000/app:1"),
        ("UPPER.example/app", "UPPER.example/app:latest"),
        ("Registry/app", "Registry/app:latest"),
        (f"busybox@{D1}", f"docker.io/library/busybox@{D1}"),
        (f"quay.io/a/b:1@{D1}", f"quay.io/a/b:1@{D1}"),
        ("a/b__c/d--e.f", "docker.io/a/b__c/d--e.f:latest"),
    ],
)
def test_names_are_normalised_as_docker_does(text: str, normalised: str) -> None:
    ref = parse_reference(text)
    assert ref.text == normalised
    assert parse_reference(ref.text) == ref


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (":tag", "empty"),
        ("Busybox", "lower case"),
        ("a//b", "not allowed"),
        ("a/-b", "not allowed"),
        ("busybox:", "tag"),
        ("busybox:" + "t" * 129, "tag"),
        ("busybox:a b", "tag"),
        ("busybox@sha256:12", "sha256:<64 hex"),
        ("busybox@md5:" + "1" * 32, "sha256:<64 hex"),
        ("http://quay.io/app", "registry host"),
        ("-bad.example/app", "registry host"),
        ("example.com:port/app", "registry host"),
        ("quay.io/" + "a" * 255, "longer than 255"),
        ("x" * 2000, "longer than 1024"),
        ("1" * 64 + ":tag", "image id"),
        ("bad\x00name", "not allowed"),
        ("bad\udcffname", "not allowed"),
    ],
)
def test_a_bad_name_is_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason) as caught:
        parse_reference(text)
    assert repr(text[:20])[1:-1] in str(caught.value)
    assert len(str(caught.value)) < 400


@given(st.text(alphabet=string.printable, max_size=80))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        ref = parse_reference(text)
    except InvalidArgument:
        return
    assert parse_reference(ref.text) == ref
    assert ref.tag or ref.digest


def record(number: str, tags: tuple[str, ...] = (), digests: tuple[str, ...] = ()) -> ImageRecord:
    digest = Digest(f"sha256:{number * (64 // len(number))}")
    return ImageRecord(
        id=ImageId(digest),
        manifest=digest,
        index=None,
        config_digest=digest,
        size=1,
        platform=Platform("linux", "amd64"),
        config=ImageConfig(),
        pulled_at=1,
        repo_tags=tags,
        repo_digests=digests,
    )


BUSYBOX = record("ab", ("docker.io/library/busybox:latest", "quay.io/copy/busybox:1"), (f"quay.io/copy/busybox@{D1}",))
OTHER = record("abc0", ("docker.io/library/cafe:latest",))
CAFE = record("cafe")
ALL = (BUSYBOX, OTHER, CAFE)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BUSYBOX.id, BUSYBOX),
        (BUSYBOX.id.removeprefix("sha256:"), BUSYBOX),
        ("abab", BUSYBOX),
        ("sha256:abab", BUSYBOX),
        ("busybox", BUSYBOX),
        ("docker.io/busybox:latest", BUSYBOX),
        ("quay.io/copy/busybox:1", BUSYBOX),
        (f"quay.io/copy/busybox@{D1}", BUSYBOX),
        (f"quay.io/copy/busybox:any@{D1}", BUSYBOX),
        ("cafe", OTHER),
        ("cafec", CAFE),
        ("sha256:cafe", CAFE),
        ("busybox:2", None),
        (f"busybox@{D1}", None),
        (f"quay.io/copy/busybox@{D2}", None),
        ("sha256:" + "0" * 64, None),
        ("dead", None),
    ],
)
def test_an_image_is_found_by_any_reference(text: str, found: ImageRecord | None) -> None:
    assert find_image(ALL, text) is found


def test_an_ambiguous_prefix_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="ambiguous, it fits 2"):
        find_image(ALL, "ab")


def test_one_tag_may_stand_for_two_platforms() -> None:
    twins = (record("1", ("quay.io/a/b:1",)), record("2", ("quay.io/a/b:1",)))
    assert find_images(twins, "quay.io/a/b:1") == twins
