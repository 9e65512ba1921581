"""Docker's config.json: who gets which credentials, which helper is asked, and no secret in any error."""

from __future__ import annotations

import json

import pytest

from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.refs import parse_reference
from cri_shim.wire.registry import Credentials
from cri_shim.wire.registry_auth import AuthFile, Helper, parse_helper_answer

AUTH = "dXNlcjpodW50ZXIy"  # user:hunter2
USER = Credentials("user", "hunter2")
HELPER = Helper("desktop", "registry.example")


def found(document: object, name: str) -> Credentials | Helper | None:
    return AuthFile(json.dumps(document).encode(), "config.json").find(parse_reference(name))


@pytest.mark.parametrize(
    "key",
    [
        "registry.example",
        "https://registry.example",
        "registry.example/",
        "https://registry.example/v2/",
        "http://registry.example/v1/",
        "registry.example/team",
        "registry.example/team/app",
    ],
)
def test_an_entry_is_for_a_registry_or_a_part_of_it(key: str) -> None:
    document = {"auths": {key: {"auth": AUTH}}}
    assert found(document, "registry.example/team/app:1") == USER
    assert found(document, "registry.example.evil/team/app:1") is None
    assert found(document, "example/team/app:1") is None
    assert (found(document, "registry.example/other:1") is None) == ("team" in key)


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io"])
def test_docker_hub_has_many_names(key: str) -> None:
    assert found({"auths": {key: {"auth": AUTH}}}, "busybox") == USER


def test_the_longest_path_wins() -> None:
    auths = {"r.example": {"auth": AUTH}, "r.example/team": {"username": "team", "password": "p"}}
    assert found({"auths": auths}, "r.example/team/app") == Credentials("team", "p")
    assert found({"auths": auths}, "r.example/teams/app") == USER


def test_tokens() -> None:
    auths = {"a.example": {"identitytoken": "i"}, "b.example": {"registrytoken": "r"}}
    assert found({"auths": auths}, "a.example/x") == Credentials(identity_token="i")
    assert found({"auths": auths}, "b.example/x") == Credentials(registry_token="r")


def test_a_helper_of_the_registry_then_an_entry_then_the_store() -> None:
    document = {
        "auths": {"a.example": {"auth": AUTH}, "b.example": {"auth": AUTH}, "c.example": {}},
        "credHelpers": {"a.example": "ecr-login"},
        "credsStore": "pass",
    }
    assert found(document, "a.example/x") == Helper("ecr-login", "a.example")
    assert found(document, "b.example/x") == USER
    assert found(document, "c.example/x") == Helper("pass", "c.example")
    assert found(document, "busybox") == Helper("pass", "https://index.docker.io/v1/")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"hunter2", "config.json: it is not JSON in the format of docker's config.json; look at images.auth_file"),
        (b'{"auths": {"a.example": "hunter2"}}', "not JSON in the format"),
        (b'{"auths": {"a.example": {"auth": "hunter2!"}}}', "auth of 'a.example' is not base64 of user:password"),
        (b'{"credsStore": "../../bin/sh"}', "'../../bin/sh' is not the name of a credential helper"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(text: bytes, reason: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        AuthFile(text, "config.json").find(parse_reference("a.example/x"))
    assert reason in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "stdout", "expected"),
    [
        (0, b'{"ServerURL":"registry.example","Username":"user","Secret":"hunter2"}\n', USER),
        (0, b'{"Username":"<token>","Secret":"hunter2"}', Credentials(identity_token="hunter2")),
        (0, b'{"Username":"","Secret":""}', None),
        (1, b"credentials not found in native keychain\n", None),
    ],
)
def test_what_a_helper_says(status: int, stdout: bytes, expected: Credentials | None) -> None:
    assert parse_helper_answer(HELPER, status, stdout) == expected


@pytest.mark.parametrize(("status", "stdout"), [(1, b"hunter2 is locked"), (0, b"hunter2"), (0, b'{"Secret": 2}')])
def test_a_helper_that_fails_is_named_and_not_quoted(status: int, stdout: bytes) -> None:
    with pytest.raises(FailedPrecondition, match=r"docker-credential-desktop .* for registry\.example") as caught:
        parse_helper_answer(HELPER, status, stdout)
    assert "hunter2" not in str(caught.value)
