"""How a node gets to a registry and says who it is: credentials of its own, helpers, certificates, proxies."""

from __future__ import annotations

import json
import os
import random
import ssl
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cri_shim.adapters.registry_auth import RegistryAuth
from cri_shim.model.errors import FailedPrecondition, PullError
from cri_shim.pb import api_pb2 as pb
from cri_shim.wire.proxy import Proxies
from tests.support import images
from tests.support.connect_proxy import ConnectProxy
from tests.support.loopback_registry import LoopbackRegistry
from tests.support.puller import Node

WASM = images.wasm_artifact(b"\0asm hello")


@asynccontextmanager
async def node_with(base: Path, auth_file: Path | None = None, proxies: Proxies | None = None) -> AsyncGenerator[Node]:
    """A node, closed at the end."""
    made = Node(base, auth=RegistryAuth(auth_file), proxies=proxies)
    await made.open()
    yield made
    await made.close()


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


async def test_a_pull_without_credentials_uses_those_of_the_node(tmp_path: Path, registry: LoopbackRegistry) -> None:
    registry.require_basic("user", "hunter2")
    name = registry.add("demo/hello:1", WASM)
    file = write(tmp_path / "config.json", {})
    async with node_with(tmp_path, file) as node:
        with pytest.raises(PullError, match="give credentials"):
            await node.pull(name)
        write(file, {"auths": {registry.address: {"username": "user", "password": "hunter2"}}})
        assert await node.pull(name) == WASM.id
        with pytest.raises(PullError, match="the credentials given are wrong"):
            await node.pull(name, pb.AuthConfig(username="user", password="other"))
        file.write_text("hunter2")
        with pytest.raises(FailedPrecondition, match=r"config\.json: it is not JSON") as caught:
            await node.pull(name)
        assert "hunter2" not in str(caught.value)
        file.unlink()
        with pytest.raises(FailedPrecondition, match=r"cannot read .*config\.json: No such file"):
            await node.pull(name)


async def test_a_helper_is_asked_at_each_pull(
    tmp_path: Path, registry: LoopbackRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.require_basic("user", "hunter2")
    name = registry.add("demo/hello:1", WASM)
    helper = tmp_path / "docker-credential-test"
    helper.write_text(
        f'#!/bin/sh\n[ "$1" = get ] || exit 3\nread -r server\necho "$server" >>{tmp_path}/asked\n'
        'echo "{\\"ServerURL\\":\\"$server\\",\\"Username\\":\\"user\\",\\"Secret\\":\\"hunter2\\"}"\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = write(tmp_path / "config.json", {"credHelpers": {registry.address: "test"}})
    async with node_with(tmp_path, file) as node:
        assert await node.pull(name) == WASM.id
        await node.pull(name)
        assert (tmp_path / "asked").read_text().split() == [registry.address] * 2
        helper.write_text("#!/bin/sh\necho hunter2\nexit 1\n")
        with pytest.raises(FailedPrecondition, match="docker-credential-test ended with status 1") as caught:
            await node.pull(name)
        assert "hunter2" not in str(caught.value)
        helper.unlink()
        with pytest.raises(FailedPrecondition, match="program docker-credential-test is missing"):
            await node.pull(name)


async def test_an_identity_token_is_exchanged(tmp_path: Path, registry: LoopbackRegistry) -> None:
    registry.require_identity("the-identity")
    name = registry.add("demo/hello:1", WASM)
    async with node_with(tmp_path) as node:
        with pytest.raises(PullError, match="HTTP 401"):
            await node.pull(name, pb.AuthConfig(identity_token="another"))
        assert await node.pull(name, pb.AuthConfig(identity_token="the-identity")) == WASM.id


async def test_a_registry_token_is_sent_as_it_is(tmp_path: Path, registry: LoopbackRegistry) -> None:
    registry.require_identity("nobody knows it")
    name = registry.add("demo/hello:1", WASM)
    async with node_with(tmp_path) as node:
        assert await node.pull(name, pb.AuthConfig(registry_token="the-token")) == WASM.id
    assert not any("/token" in request for request in registry.requests)


async def test_a_proxy_is_used_and_gets_its_own_credentials(tmp_path: Path, registry: LoopbackRegistry) -> None:
    """The loopback registry plays the proxy: it answers for the host that is asked of it."""
    registry.add("demo/hello:1", WASM)
    proxy = f"http://user:hunter2@{registry.address}"
    async with node_with(tmp_path, proxies=Proxies({"http": proxy})) as node:
        place = node.certs / "registry.invalid"
        place.mkdir(parents=True)
        (place / "hosts.toml").write_text('server = "http://registry.invalid"\n')
        assert await node.pull("registry.invalid/demo/hello:1") == WASM.id
    assert all("http://registry.invalid/v2/" in request for request in registry.requests)
    assert registry.proxy_authorizations == {"Basic dXNlcjpodW50ZXIy"}
    assert registry.authorizations == []


async def test_a_proxy_that_fails_is_told_without_its_password(tmp_path: Path) -> None:
    proxies = Proxies({"https": "http://user:hunter2@127.0.0.1:1"})
    async with node_with(tmp_path, proxies=proxies) as node:
        with pytest.raises(PullError, match=r"^RegistryUnavailable: registry registry\.invalid: ") as caught:
            await node.pull("registry.invalid/demo/hello:1")
        assert "hunter2" not in str(caught.value)


@pytest.fixture
def server(tmp_path: Path) -> ssl.SSLContext:
    """For `localhost` and `registry.invalid`; the certificate is `server.cert`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate(tmp_path, "server"))
    return context


def trusted(node: Node, certificate: Path) -> Node:
    """A node that knows `registry.invalid` by its certificate."""
    place = node.certs / "registry.invalid"
    place.mkdir(parents=True)
    (place / "hosts.toml").write_text(f'server = "https://registry.invalid"\nca = "{certificate}"\n')
    return node


async def test_tls_goes_through_a_tunnel(tmp_path: Path, server: ssl.SSLContext) -> None:
    """The proxy gets its own credentials and sees nothing of the registry's; a tunnel that breaks is made again."""
    layer = random.Random(1).randbytes(3 << 20)
    image = images.wasm_artifact(layer)
    with (
        LoopbackRegistry(tls=server) as registry,
        ConnectProxy(registry.address, user="u", password="hunter2") as proxy,
    ):
        registry.require_basic("user", "secret of the registry")
        registry.add("demo/hello:1", image)
        auth = pb.AuthConfig(username="user", password="secret of the registry")
        environment = {"HTTPS_PROXY": proxy.url, "NO_PROXY": "10.0.0.0/8,.example.com"}
        with capture_logs() as logs:
            async with node_with(tmp_path, proxies=Proxies.from_environment(environment)) as node:
                proxy.break_after(1 << 20)
                assert (
                    await trusted(node, tmp_path / "server.cert").pull("registry.invalid/demo/hello:1", auth)
                    == image.id
                )
        assert len(proxy.tunnels) > 1
        assert set(proxy.tunnels) == {"registry.invalid:443"}
        assert registry.starts[image.blobs[1].digest][-1] > 0
        assert registry.proxy_authorizations == set()
        assert b"Authorization" not in proxy.passed
        assert "hunter2" not in str(logs)
        assert "secret of the registry" not in str(logs)


async def test_a_proxy_may_itself_be_reached_by_tls(
    tmp_path: Path, server: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its certificate is held against what the node trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.cert"))
    with LoopbackRegistry(tls=server) as registry, ConnectProxy(registry.address, tls=server) as proxy:
        registry.add("demo/hello:1", WASM)
        async with node_with(tmp_path, proxies=Proxies({"https": proxy.url})) as node:
            assert await trusted(node, tmp_path / "server.cert").pull("registry.invalid/demo/hello:1") == WASM.id
        assert set(proxy.tunnels) == {"registry.invalid:443"}


async def test_a_proxy_that_wants_other_credentials(tmp_path: Path, server: ssl.SSLContext) -> None:
    with LoopbackRegistry(tls=server) as registry, ConnectProxy(registry.address, user="u", password="p") as proxy:
        proxies = Proxies({"https": proxy.url.replace("u:p@", "u:hunter2@")})
        with capture_logs() as logs:
            async with node_with(tmp_path, proxies=proxies) as node:
                with pytest.raises(PullError, match="the proxy answers with HTTP 407") as caught:
                    await trusted(node, tmp_path / "server.cert").pull("registry.invalid/demo/hello:1")
        assert "hunter2" not in f"{caught.value}{logs}"
        assert registry.requests == proxy.tunnels == []


async def test_an_exception_goes_around_the_proxy(tmp_path: Path, server: ssl.SSLContext) -> None:
    with LoopbackRegistry(tls=server) as registry, ConnectProxy(registry.address) as proxy:
        environment = {"https_proxy": proxy.url, "no_proxy": "registry.invalid:443"}
        async with node_with(tmp_path, proxies=Proxies.from_environment(environment)) as node:
            with pytest.raises(PullError, match=r"registry registry\.invalid: cannot connect"):
                await trusted(node, tmp_path / "server.cert").pull("registry.invalid/demo/hello:1")
        assert proxy.tunnels == []


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A certificate that signs itself, for localhost and a registry that is nowhere, and its key."""
    key, cert = directory / f"{name}.key", directory / f"{name}.cert"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}"]
    names = ["-addext", "subjectAltName=DNS:localhost,DNS:registry.invalid", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*request, *names], check=True, capture_output=True)
    return cert, key


async def test_a_client_certificate_is_shown(tmp_path: Path) -> None:
    server, client = certificate(tmp_path, "server"), certificate(tmp_path, "client")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*server)
    context.load_verify_locations(client[0])
    context.verify_mode = ssl.CERT_REQUIRED
    with LoopbackRegistry(tls=context) as secure:
        secure.add("demo/hello:1", WASM)
        name = f"localhost:{secure.address.rpartition(':')[2]}"
        async with node_with(tmp_path) as node:
            place = node.certs / name
            place.mkdir(parents=True)
            hosts = f'server = "https://{name}"\nca = "{server[0]}"\n'
            (place / "hosts.toml").write_text(hosts)
            with pytest.raises(PullError, match=r"certificate|RegistryUnavailable"):
                await node.pull(f"{name}/demo/hello:1")
            (place / "hosts.toml").write_text(f'{hosts}client = [["{client[0]}", "{client[1]}"]]\n')
            assert await node.pull(f"{name}/demo/hello:1") == WASM.id


async def test_a_host_that_lies_is_asked_last(tmp_path: Path, registry: LoopbackRegistry) -> None:
    """A mirror with wrong content costs time, not the image."""
    with LoopbackRegistry() as mirror:
        for each in (mirror, registry):
            each.add("demo/hello:1", WASM)
        mirror.corrupt_blobs()
        async with node_with(tmp_path) as node:
            place = node.certs / "registry.invalid"
            place.mkdir(parents=True)
            (place / "hosts.toml").write_text(f'server = "{registry.url}"\n[host."{mirror.url}"]\n')
            assert await node.pull("registry.invalid/demo/hello:1") == WASM.id
        assert registry.sent[WASM.blobs[1].digest] == len(WASM.blobs[1].data)


async def test_paths_and_headers_of_a_mirror(tmp_path: Path, registry: LoopbackRegistry) -> None:
    registry.add("demo/hello:1", WASM)
    async with node_with(tmp_path) as node:
        place = node.certs / "registry.invalid"
        place.mkdir(parents=True)
        (place / "hosts.toml").write_text(
            f'server = "http://registry.invalid"\n'
            f'[host."{registry.url}/v2"]\noverride_path = true\ndial_timeout = "2s"\n'
            f'[host."{registry.url}/v2".header]\nAuthorization = ["Basic header"]\n'
        )
        assert await node.pull("registry.invalid/demo/hello:1") == WASM.id
    assert set(registry.authorizations) == {"Basic header"}
