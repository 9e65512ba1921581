"""The pull conversation: challenges, tokens, redirects, errors, and that secrets go nowhere else."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from cri_shim.model.errors import FailedPrecondition, InvalidArgument
from cri_shim.model.ids import Digest
from cri_shim.model.refs import parse_reference
from cri_shim.wire.registry import (
    MAX_REDIRECTS,
    Accepted,
    Answer,
    Conversation,
    Credentials,
    Exchange,
    Failure,
    RangeError,
    RegistryError,
    Retries,
    content_start,
    parse_challenges,
    parse_credentials,
    retry_after,
)
from cri_shim.wire.registry_hosts import (
    Capability,
    RegistryHost,
    Tls,
    default_host,
    directory_names,
    parse_hosts,
)

REF = parse_reference("registry.example/team/app:1")
HOST = default_host("registry.example")
DIGEST = Digest("sha256:" + "1" * 64)
SECRET = Credentials("user", "pa:ss")
BASIC = "Basic " + base64.b64encode(b"user:pa:ss").decode()
BEARER = 'Bearer realm="https://auth.example/token?x=1",service="registry.example",scope="repository:team/app:pull"'
OK = Answer(200, {})


def header(exchange: Exchange, name: str = "Authorization") -> str | None:
    return dict(exchange.request.headers).get(name)


def challenge(value: str) -> Answer:
    return Answer(401, {"www-authenticate": value})


def token(value: str) -> Answer:
    return Answer(200, {}, json.dumps({"token": value}).encode())


def test_a_manifest_is_asked_for_by_every_type_we_know() -> None:
    exchange = Conversation(HOST, REF, None).manifest("1")
    assert exchange.request.url == "https://registry.example/v2/team/app/manifests/1"
    accept = header(exchange, "Accept") or ""
    assert "vnd.oci.image.index.v1+json" in accept
    assert "vnd.docker.distribution.manifest.v2+json" in accept
    assert header(exchange) is None
    assert exchange.receive(OK) is Accepted.ACCEPTED


def test_a_mirror_is_told_whose_content_is_wanted() -> None:
    host = RegistryHost("http://127.0.0.1:5000/v2", is_mirror=True)
    exchange = Conversation(host, REF, None).blob(DIGEST)
    assert exchange.request.url == f"http://127.0.0.1:5000/v2/team/app/blobs/{DIGEST}?ns=registry.example"


def test_basic_credentials_follow_a_challenge_and_stay() -> None:
    conversation = Conversation(HOST, REF, SECRET)
    exchange = conversation.manifest("1")
    assert header(exchange) is None
    assert exchange.receive(challenge('Basic realm="x"')) is None
    assert header(exchange) == BASIC
    assert exchange.receive(OK) is Accepted.ACCEPTED
    assert header(conversation.blob(DIGEST)) == BASIC


def test_a_bearer_token_is_fetched_with_the_credentials_and_reused() -> None:
    conversation = Conversation(HOST, REF, SECRET)
    exchange = conversation.manifest("1")
    exchange.receive(challenge(BEARER))
    assert exchange.wants_body
    asked = urlsplit(exchange.request.url)
    assert (asked.netloc, header(exchange)) == ("auth.example", BASIC)
    assert parse_qs(asked.query) == {
        "x": ["1"],
        "service": ["registry.example"],
        "scope": ["repository:team/app:pull"],
    }
    assert exchange.receive(token("t0k")) is None
    assert header(exchange) == "Bearer t0k"
    assert header(conversation.blob(DIGEST)) == "Bearer t0k"


def test_a_token_that_has_run_out_is_fetched_again_once() -> None:
    conversation = Conversation(HOST, REF, None)
    first = conversation.manifest("1")
    first.receive(challenge(BEARER))
    first.receive(token("old"))
    later = conversation.blob(DIGEST)
    later.receive(challenge(BEARER))
    later.receive(token("new"))
    assert header(later) == "Bearer new"
    with pytest.raises(RegistryError, match="refuses blob sha256:1") as caught:
        later.receive(challenge(BEARER))
    assert caught.value.failure is Failure.DENIED


def test_an_identity_token_is_exchanged_in_a_form() -> None:
    exchange = Conversation(HOST, REF, Credentials(identity_token="id&tok")).manifest("1")
    exchange.receive(challenge(BEARER))
    form = parse_qs((exchange.request.body or b"").decode())
    assert form["grant_type"] == ["refresh_token"]
    assert form["refresh_token"] == ["id&tok"]
    assert "id" not in exchange.request.url.partition("auth.example")[2]
    exchange.receive(Answer(200, {}, b'{"access_token": "a"}'))
    assert header(exchange) == "Bearer a"


def test_a_registry_token_is_sent_as_it_is() -> None:
    assert header(Conversation(HOST, REF, Credentials(registry_token="raw")).manifest("1")) == "Bearer raw"


@pytest.mark.parametrize(
    ("server", "host", "sent"),
    [
        ("registry.example", HOST, True),
        ("other.example", HOST, False),
        ("registry.example", RegistryHost("https://mirror.example/v2", is_mirror=True), False),
        ("mirror.example", RegistryHost("https://mirror.example/v2", is_mirror=True), True),
        ("", RegistryHost("https://mirror.example/v2", is_mirror=True), True),
    ],
)
def test_the_server_address_says_who_gets_the_credentials(server: str, host: RegistryHost, sent: bool) -> None:
    exchange = Conversation(host, REF, Credentials("user", "pa:ss", server=server)).manifest("1")
    if sent:
        exchange.receive(challenge("Basic"))
        assert header(exchange) == BASIC
        return
    with pytest.raises(RegistryError, match="imagePullSecret"):
        exchange.receive(challenge("Basic"))
    assert header(exchange) is None


def test_docker_hub_goes_by_its_old_name_too() -> None:
    ref = parse_reference("busybox")
    credentials = Credentials("user", "pa:ss", server="index.docker.io")
    exchange = Conversation(default_host(ref.domain), ref, credentials).manifest("1")
    exchange.receive(challenge("Basic"))
    assert exchange.request.url.startswith("https://registry-1.docker.io/v2/library/busybox/")
    assert header(exchange) == BASIC


def test_a_redirect_to_another_host_carries_no_credentials_and_no_private_header() -> None:
    host = RegistryHost("https://registry.example/v2", headers=(("X-Key", "k"),))
    exchange = Conversation(host, REF, Credentials(registry_token="raw")).blob(DIGEST)
    assert header(exchange, "X-Key") == "k"
    exchange.receive(Answer(307, {"location": "https://cdn.example/blob?sig=1"}))
    assert exchange.request.url == "https://cdn.example/blob?sig=1"
    assert header(exchange) is None
    assert header(exchange, "X-Key") is None
    with pytest.raises(RegistryError, match=r"cdn\.example refuses"):
        exchange.receive(challenge(BEARER))


@pytest.mark.parametrize("place", ["/elsewhere", "https://registry.example:443/elsewhere"])
def test_a_redirect_within_the_host_keeps_them(place: str) -> None:
    exchange = Conversation(HOST, REF, Credentials(registry_token="raw")).blob(DIGEST)
    exchange.receive(Answer(302, {"location": place}))
    assert header(exchange) == "Bearer raw"


@pytest.mark.parametrize(
    "place", ["https://registry.example:8443/x", "https://registry.example.evil/x", "//evil.example/x"]
)
def test_another_port_or_name_is_another_host(place: str) -> None:
    exchange = Conversation(HOST, REF, Credentials(registry_token="raw")).blob(DIGEST)
    exchange.receive(Answer(302, {"location": place}))
    assert header(exchange) is None


@pytest.mark.parametrize("place", ["http://registry.example/x", "ftp://x/y", "", "file:///etc/passwd"])
def test_redirects_out_of_https_are_refused(place: str) -> None:
    exchange = Conversation(HOST, REF, None).blob(DIGEST)
    if not place:
        for _ in range(MAX_REDIRECTS):
            exchange.receive(Answer(302, {}))
    with pytest.raises(RegistryError, match="redirects"):
        exchange.receive(Answer(302, {"location": place}))


def test_credentials_are_not_sent_to_a_token_service_in_the_clear() -> None:
    exchange = Conversation(HOST, REF, SECRET).manifest("1")
    with pytest.raises(RegistryError, match="plain http"):
        exchange.receive(challenge('Bearer realm="http://auth.example/token"'))


@pytest.mark.parametrize(
    ("answer", "failure", "text"),
    [
        (Answer(404, {}, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no\\nsuch"}]}'), Failure.NOT_FOUND,
         "manifest registry.example/team/app:1 not found at registry registry.example (MANIFEST_UNKNOWN: no such)"),
        (Answer(403, {}), Failure.DENIED, "registry registry.example refuses manifest registry.example/team/app:1"),
        (Answer(500, {}, b"<html>"), Failure.UNAVAILABLE, "RegistryUnavailable: registry registry.example answers"),
        (Answer(429, {}), Failure.UNAVAILABLE, "RegistryUnavailable: registry registry.example answers manifest"),
        (Answer(418, {}), Failure.OTHER, "registry registry.example answers manifest"),
        (challenge("Negotiate"), Failure.DENIED, "registry registry.example refuses"),
        (challenge("Bearer"), Failure.OTHER, "registry registry.example asks for a token but"),
    ],
)  # fmt: skip
def test_errors_say_who_and_what(answer: Answer, failure: Failure, text: str) -> None:
    exchange = Conversation(HOST, REF, SECRET).manifest("1")
    with pytest.raises(RegistryError) as caught:
        exchange.receive(answer)
    assert caught.value.failure is failure
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    "answer", [Answer(401, {}), Answer(200, {}, b"{}"), Answer(200, {}, b"no"), Answer(503, {}), token("a\nb")]
)
def test_no_error_holds_a_secret(answer: Answer) -> None:
    exchange = Conversation(HOST, REF, Credentials("user", "hunter2", identity_token="topsecret")).manifest("1")
    exchange.receive(challenge(BEARER))
    with pytest.raises(RegistryError) as caught:
        exchange.receive(answer)
    for secret in ("hunter2", "topsecret", base64.b64encode(b"user:hunter2").decode()):
        assert secret not in str(caught.value)
        assert secret not in repr(exchange.request)
    assert "hunter2" not in repr(Credentials("user", "hunter2"))


def test_challenges_are_parsed_as_http_says() -> None:
    text = 'Basic realm="a, \\"b\\"", Bearer realm="https://x/y",service=z , scope="r:a:pull,push"'
    assert parse_challenges(text) == {
        "basic": {"realm": 'a, "b"'},
        "bearer": {"realm": "https://x/y", "service": "z", "scope": "r:a:pull,push"},
    }
    assert parse_challenges("Negotiate") == {"negotiate": {}}
    assert parse_challenges("") == {}


def auth(**fields: str) -> Credentials | None:
    names = ("username", "password", "auth", "identity_token", "registry_token", "server_address")
    return parse_credentials(**{name: fields.get(name, "") for name in names})


def test_cri_credentials_in_all_their_forms() -> None:
    encoded = base64.b64encode(b"user:pa:ss\0\0").decode()
    assert auth() is None
    assert auth(server_address="x") is None
    assert auth(username="user", password="p") == Credentials("user", "p")
    assert auth(auth=encoded) == SECRET
    assert auth(auth=encoded, username="other", password="q") == Credentials("other", "q")
    assert auth(registry_token="t", server_address="https://a.example:5000/v1/") == Credentials(
        registry_token="t", server="a.example:5000"
    )


@pytest.mark.parametrize(
    "text", ["***", "é", base64.b64encode(b"nocolon").decode(), base64.b64encode(b"\xff:\xff").decode()]
)
def test_auth_that_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="base64 of user:password"):
        auth(auth=text)


@pytest.mark.parametrize(
    ("domain", "url"),
    [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("quay.io", "https://quay.io/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.0.0.2", "http://127.0.0.2/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("10.0.0.1:5000", "https://10.0.0.1:5000/v2"),
    ],
)
def test_loopback_registries_speak_plain_http(domain: str, url: str) -> None:
    assert default_host(domain).url == url


FILE = Path("/certs/docker.io/hosts.toml")


def test_hosts_come_in_order_with_the_registry_last() -> None:
    text = """
    server = "https://upstream.example"
    ca = "up.crt"
    [host."http://127.0.0.1:5000"]
      capabilities = ["pull", "resolve"]
    [host."https://mirror.example/cache"]
      capabilities = ["pull"]
      dial_timeout = "1m1.5s"
      ca = ["/abs.crt", "rel.crt"]
      client = [["c.crt", "c.key"], "both.pem"]
      skip_verify = true
      override_path = true
      [host."https://mirror.example/cache".header]
        x-team = ["a", "b"]
    """
    first, second, last = parse_hosts(text, "docker.io", FILE)
    assert first == RegistryHost("http://127.0.0.1:5000/v2", is_mirror=True)
    assert second.url == "https://mirror.example/cache"
    assert second.capabilities == {Capability.PULL}
    assert second.tls == Tls(
        ca=(Path("/abs.crt"), Path("/certs/docker.io/rel.crt")),
        client=((FILE.with_name("c.crt"), FILE.with_name("c.key")), (FILE.with_name("both.pem"), None)),
        skip_verify=True,
    )
    assert second.headers == (("x-team", "a"), ("x-team", "b"))
    assert (first.connect_seconds, second.connect_seconds) == (0, 61.5)
    assert (last.url, last.is_mirror, last.tls.ca) == (
        "https://upstream.example/v2",
        False,
        (FILE.with_name("up.crt"),),
    )


def test_without_a_server_the_registry_itself_is_last() -> None:
    mirror, last = parse_hosts('[host."mirror.example"]', "docker.io", FILE)
    assert mirror.url == "https://mirror.example/v2"
    assert last == default_host("docker.io")


@pytest.mark.parametrize(
    "text",
    [
        "server = 3",
        "server = 'ftp://x'",
        "server = 'https://user:secret@x'",
        "host = 3",
        "[host.'https://x']\ncapabilities = ['fly']",
        "[host.'https://x']\nskip_verify = 'yes'",
        "[host.'https://x']\nca = 3",
        "[host.'https://x']\ndial_timeout = 3",
        "[host.'https://x']\ndial_timeout = 'soon'",
        "[host.'https://x']\nclient = [['a', 'b', 'c']]",
        "[host.'https://x'.header]\na = \"x\\r\\ny: z\"",
        "not toml",
    ],
)
def test_a_broken_hosts_file_is_named(text: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"/certs/docker\.io/hosts\.toml: "):
        parse_hosts(text, "docker.io", FILE)


def test_directories_of_a_registry_with_a_port() -> None:
    assert directory_names("localhost:5000") == ("localhost_5000_", "localhost:5000", "localhost", "_default")
    assert directory_names("docker.io") == ("docker.io", "_default")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "12"}, 12),
        ({"retry-after": "-1"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, 0),
    ],
)
def test_when_a_registry_wants_to_be_asked_again(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == seconds


def test_what_may_pass_is_tried_again_later_and_later() -> None:
    retries, broken = Retries((1, 5)), RegistryError(Failure.UNAVAILABLE, "x")
    assert [retries.delay(broken, progressed=False) for _ in range(3)] == [1, 5, None]
    assert retries.delay(broken, progressed=True) == 1
    assert retries.delay(RegistryError(Failure.UNAVAILABLE, "x", retry_after=9), progressed=False) == 9
    assert Retries((1,)).delay(RegistryError(Failure.UNAVAILABLE, "x", retry_after=3600), progressed=False) is None
    assert Retries((1,)).delay(RegistryError(Failure.NOT_FOUND, "x"), progressed=True) is None


def test_the_rest_of_a_blob_is_asked_for_by_range() -> None:
    exchange = Conversation(HOST, REF, None).blob(DIGEST, 7, '"strong"')
    assert (header(exchange, "Range"), header(exchange, "If-Range")) == ("bytes=7-", '"strong"')
    weak = Conversation(HOST, REF, None).blob(DIGEST, 7, 'W/"weak"')
    assert (header(weak, "Range"), header(weak, "If-Range")) == ("bytes=7-", None)
    assert header(Conversation(HOST, REF, None).blob(DIGEST, 0, '"strong"'), "If-Range") is None
    with pytest.raises(RangeError, match="does not give a part"):
        exchange.receive(Answer(416, {}))


@pytest.mark.parametrize(
    ("answer", "start"),
    [
        (Answer(200, {}), 0),
        (Answer(206, {"content-range": "bytes 7-9/10"}), 7),
        (Answer(206, {"content-range": "bytes 7-9/*"}), 7),
        (Answer(206, {"content-range": "bytes 6-9/10"}), None),
        (Answer(206, {"content-range": "bytes 7-9/11"}), None),
        (Answer(206, {"content-range": "items 7-9/10"}), None),
        (Answer(206, {}), None),
    ],
)
def test_where_content_begins(answer: Answer, start: int | None) -> None:
    if start is None:
        with pytest.raises(RangeError, match="expected the bytes from 7 of 10"):
            content_start(answer, 7, 10)
    else:
        assert content_start(answer, 7, 10) == start
