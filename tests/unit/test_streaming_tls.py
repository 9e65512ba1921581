"""Streaming over TLS: certificates as openssl makes them, replaced while the server runs."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.streams import ClientStreams, Sink
from cri_shim.streaming.server import Server, Settings
from cri_shim.streaming.ticket import Limits
from cri_shim.streaming.tls import Certificate
from tests.support.streaming_client import WebSocketClient
from tests.unit.test_streaming import ALL, OUTPUT, echo, ends, in_time, opened, serving


def make(directory: Path, name: str) -> Certificate:
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    request = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
    ]
    names = ["-subj", f"/CN={name}", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*request, *names], check=True, capture_output=True)
    return Certificate(cert, key)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return make(tmp_path, "first")


async def served(server: Server) -> bytes:
    """The certificate that a new connection is shown, DER."""
    parts = urlsplit(server.exec_url(OUTPUT, ends(0)))
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    assert isinstance(shown, bytes)
    return shown


def der(file: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(file.read_text())


async def test_sessions(certificate: Certificate) -> None:
    content = random.Random(5).randbytes(2 << 20)
    async with serving(Settings(certificate=certificate)) as server:
        url = server.exec_url(ALL, echo)
        assert url.startswith("https://127.0.0.1:")
        client = await opened(url, "error", "stdin", "stdout", "stderr")

        async def send() -> None:
            await client.send("stdin", content)
            client.end("stdin")

        sending = asyncio.create_task(send())
        await in_time(client.until_goaway())
        await sending
        assert client.received("stdout") == content
        websocket = await WebSocketClient.open(server.exec_url(OUTPUT, ends(3, b"out")), "v5.channel.k8s.io")
        await in_time(websocket.until_closed())
        assert websocket.received(1) == b"out"


async def test_neither_side_outruns_the_other(certificate: Certificate) -> None:
    """A writer whose client does not read, then a client whose session does not: both stop, and the session goes on."""
    written, stuck, take = 0, asyncio.Event(), asyncio.Event()

    async def session(streams: ClientStreams) -> int:
        nonlocal written
        assert streams.stdin is not None
        assert streams.stdout is not None
        write = asyncio.create_task(write_all(streams.stdout))
        before = -1
        while written != before:
            before = written
            await asyncio.sleep(0.3)
        stuck.set()
        await take.wait()
        while await streams.stdin.read():
            pass
        await write
        return 0

    async def write_all(stdout: Sink) -> None:
        nonlocal written
        while written < 64 << 20:
            await stdout.write(bytes(32 << 10))
            written += 32 << 10

    async with serving(Settings(certificate=certificate)) as server:
        client = await opened(server.exec_url(ALL, session), "error", "stdin", "stdout", "stderr")
        sent = 0

        async def send() -> None:
            nonlocal sent
            while sent < 64 << 20:
                await client.send("stdin", bytes(32 << 10))
                sent += 32 << 10
            client.end("stdin")

        sending = asyncio.create_task(send())
        await in_time(stuck.wait())
        assert written < 32 << 20
        assert sent < 32 << 20
        take.set()
        await in_time(client.until_goaway())
        await sending
        assert len(client.received("stdout")) == sent == 64 << 20


async def test_a_changed_certificate_is_taken(certificate: Certificate, tmp_path: Path) -> None:
    async with serving(Settings(certificate=certificate)) as server:
        first = der(certificate.cert_file)
        assert await served(server) == first
        other = make(tmp_path, "other")
        os.replace(other.cert_file, certificate.cert_file)
        assert await served(server) == first  # the key does not fit yet
        os.replace(other.key_file, certificate.key_file)
        assert await served(server) == der(certificate.cert_file) != first
        certificate.key_file.unlink()
        assert await served(server) == der(certificate.cert_file)


@pytest.mark.parametrize("broken", ["missing", "empty", "encrypted", "other"])
async def test_no_start_without_a_good_pair(certificate: Certificate, tmp_path: Path, broken: str) -> None:
    match broken:
        case "missing":
            certificate.cert_file.unlink()
        case "empty":
            certificate.key_file.write_bytes(b"")
        case "encrypted":
            key = str(certificate.key_file)
            subprocess.run(
                ["openssl", "ec", "-aes128", "-passout", "pass:secret", "-in", key, "-out", key],
                check=True,
                capture_output=True,
            )
        case _:
            os.replace(make(tmp_path, "other").key_file, certificate.key_file)
    with pytest.raises(FailedPrecondition, match=r"cannot read the certificate of streaming.tls from .*first.crt"):
        await Server(Settings(certificate=certificate)).start()


async def test_a_handshake_that_never_ends(certificate: Certificate) -> None:
    async with serving(Settings(certificate=certificate, limits=Limits(head=0.1))) as server:
        parts = urlsplit(server.exec_url(OUTPUT, ends(0)))
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()
        await writer.wait_closed()


async def test_an_address_that_cannot_be_used() -> None:
    async with serving() as server:
        port = urlsplit(server.exec_url(OUTPUT, ends(0))).port
        assert port is not None
        with pytest.raises(
            FailedPrecondition, match=rf"cannot listen on 127\.0\.0\.1:{port} for streaming: .*; set another"
        ):
            await Server(Settings(port=port)).start()
    with pytest.raises(FailedPrecondition, match=r"cannot listen on 192\.0\.2\.1:0"):
        await Server(Settings(address="192.0.2.1")).start()


@pytest.mark.parametrize(
    ("address", "host"), [("0.0.0.0", "127.0.0.1"), ("localhost", None), ("127.0.0.1", "127.0.0.1")]
)
async def test_urls_can_be_dialled(address: str, host: str | None) -> None:
    async with serving(Settings(address=address)) as server:
        url = server.exec_url(OUTPUT, ends(0, b"out"))
        assert host in {None, urlsplit(url).hostname}
        client = await opened(url, "error", "stdout")
        await in_time(client.until_goaway())
        assert client.received("stdout") == b"out"
