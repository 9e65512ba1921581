"""Small clients of the streaming server, over SPDY and over WebSocket: what a kubelet, crictl or kubectl would send.

For tests that want to decide what is sent and when; real clients are in `tests/interop`. Invariant: nothing is sent
that the test has not asked for, but for the WebSocket library's own pongs.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

from tests.support import spdy
from tests.support.spdy import FIN, SpdyPeer

TIMEOUT = 60.0
CHANNELS = {"stdin": 0, "stdout": 1, "stderr": 2, "error": 3, "resize": 4}


class Refused(Exception):
    """The server has answered with an HTTP error."""

    def __init__(self, status: int, head: str, body: bytes) -> None:
        super().__init__(f"{status}: {body!r}")
        self.status = status
        self.head = head
        self.body = body


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    context = None
    if parts.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return await asyncio.open_connection(parts.hostname, parts.port, ssl=context, limit=1 << 20)


def head(url: str, headers: Mapping[str, str], method: str = "POST") -> bytes:
    parts = urlsplit(url)
    lines = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode()


def spdy_head(url: str, *protocols: str) -> bytes:
    return head(
        url,
        {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": ", ".join(protocols)},
    )


async def answer(reader: asyncio.StreamReader) -> str:
    """The head of a 101. Raises Refused for any other."""
    text = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT)).decode()
    status = int(text.split()[1])
    if status != 101:
        raise Refused(status, text, await asyncio.wait_for(reader.read(), TIMEOUT))
    return text


@dataclass
class SpdyClient:
    """One connection after its upgrade."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    response: str
    peer: SpdyPeer = field(default_factory=SpdyPeer)
    roles: dict[str, int] = field(default_factory=dict)

    @classmethod
    async def open(cls, url: str, *protocols: str) -> SpdyClient:
        reader, writer = await connect(url)
        writer.write(spdy_head(url, *(protocols or ("v4.channel.k8s.io",))))
        try:
            return cls(reader, writer, await answer(reader))
        except Refused:
            writer.close()
            raise

    def stream(self, role: str, **headers: str) -> int:
        """Open a stream; it is known by its role, or by its number."""
        self.writer.write(self.peer.open({"streamtype": role, **headers}))
        self.roles[role] = self.peer.opened
        return self.peer.opened

    async def send(self, role: str, content: bytes, piece: int = 32 << 10) -> None:
        for start in range(0, len(content), piece):
            self.writer.write(spdy.data(self.roles[role], content[start : start + piece]))
            await self.writer.drain()

    def end(self, role: str) -> None:
        self.writer.write(spdy.data(self.roles[role], b"", FIN))

    async def read_some(self, size: int = 256 << 10) -> bool:
        """One read; whether there was anything."""
        got = await asyncio.wait_for(self.reader.read(size), TIMEOUT)
        self.peer.receive(got)
        return bool(got)

    def stop_reading(self) -> None:
        """From now on only the kernel takes what comes; a reader nobody asks would take 2 MiB by itself."""
        cast("asyncio.Transport", self.writer.transport).pause_reading()

    async def until_goaway(self) -> None:
        """Read until the server says goodbye, as a client of Kubernetes does, and close."""
        while not self.peer.goaways and await self.read_some():
            pass
        assert not self.peer.held
        await self.close()

    def received(self, role: str) -> bytes:
        return bytes(self.peer.received.get(self.roles[role], b""))

    def has_ended(self, role: str) -> bool:
        return self.roles[role] in self.peer.ended

    def status(self) -> Any:
        return json.loads(self.received("error"))

    async def close(self) -> None:
        self.writer.close()


@dataclass
class WebSocketClient:
    """One connection after its upgrade; channels by number, or SPDY in a tunnel."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    core: ClientProtocol
    messages: list[bytes] = field(default_factory=list)
    in_base64: bool = False
    response: str = ""
    pongs: int = 0

    @classmethod
    async def open(cls, url: str, *protocols: str) -> WebSocketClient:
        reader, writer = await connect(url)
        core = ClientProtocol(parse_uri("ws" + url.removeprefix("http")))
        request = core.connect()
        if protocols:
            request.headers["Sec-WebSocket-Protocol"] = ", ".join(protocols)
        core.send_request(request)
        client = cls(reader, writer, core, in_base64=any("base64" in name for name in protocols))
        client.flush()
        try:
            client.response = text = await answer(reader)
        except Refused:
            writer.close()
            raise
        # The library refuses the slash in the name of the tunnel.
        lines = [line for line in text.split("\r\n") if not line.lower().startswith("sec-websocket-protocol: ")]
        core.receive_data("\r\n".join(lines).encode())
        (response,) = core.events_received()
        assert isinstance(response, Response)
        assert core.handshake_exc is None, core.handshake_exc
        return client

    def flush(self) -> None:
        for part in self.core.data_to_send():
            if part:
                self.writer.write(part)

    async def send(self, channel: int, content: bytes, piece: int = 32 << 10) -> None:
        for start in range(0, len(content), piece):
            self.message(bytes((channel,)) + content[start : start + piece])
            await self.writer.drain()

    async def say(self, channel: int, content: bytes) -> None:
        """One message in the form of the sub-protocol."""
        if self.in_base64:
            self.core.send_text(bytes((48 + channel,)) + base64.b64encode(content))
            self.flush()
        else:
            await self.send(channel, content)

    def message(self, content: bytes) -> None:
        self.core.send_binary(content)
        self.flush()

    async def read_some(self) -> bool:
        got = await asyncio.wait_for(self.reader.read(256 << 10), TIMEOUT)
        if not got:
            return False
        self.core.receive_data(got)
        for frame in self.core.events_received():
            if isinstance(frame, Frame) and frame.opcode in {Opcode.TEXT, Opcode.BINARY}:
                self.messages.append(bytes(frame.data))
            elif isinstance(frame, Frame) and frame.opcode is Opcode.PONG:
                self.pongs += 1
        self.flush()
        return True

    async def until_closed(self) -> None:
        while await self.read_some():
            pass
        self.core.receive_eof()
        self.writer.close()

    def received(self, channel: int) -> bytes:
        if self.in_base64:
            return b"".join(base64.b64decode(message[1:]) for message in self.messages if message[0] - 48 == channel)
        return b"".join(message[1:] for message in self.messages if message[0] == channel)
