"""Connections into a pod's network namespace: what they reach, and how each of their ways ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_shim.adapters import pod_port
from cri_shim.kernel import namespaces
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.streams import Connection

pytestmark = pytest.mark.root

PORT = 7001


@pytest.fixture
def netns(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "ns"
    namespaces.pin_namespaces(directory, net=True, ipc=False, uts=False, hostname="", sysctls={})
    yield directory / "net"
    namespaces.unpin(directory)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read())
    writer.close()


async def listening(netns: Path, family: socket.AddressFamily, address: str) -> asyncio.Server:
    made = namespaces.run_in_netns(netns, lambda: socket.create_server((address, PORT), family=family))
    return await asyncio.start_server(echo, sock=made)


async def everything(connection: Connection) -> bytes:
    received = b""
    while piece := await connection.read():
        received += piece
    return received


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
async def test_both_addresses_and_the_end_of_each_way(netns: Path, family: socket.AddressFamily, address: str) -> None:
    async with await listening(netns, family, address):
        connection = await pod_port.connect(netns, PORT)
        await connection.write(b"x" * 30_000)
        await connection.close_write()
        assert len(await everything(connection)) == 30_000
        connection.close()
        connection.close()
        with pytest.raises(FailedPrecondition, match="refused"):
            await pod_port.connect(None, PORT)  # nothing of it is in the node's own network


async def test_why_there_is_no_connection(netns: Path) -> None:
    words = r"port 7001 of the pod: 127\.0\.0\.1: connection refused, ::1: connection refused$"
    with pytest.raises(FailedPrecondition, match=words):
        await pod_port.connect(netns, PORT)
    namespaces.unpin(netns.parent)
    with pytest.raises(FailedPrecondition, match="is gone"):
        await pod_port.connect(netns, PORT)


async def test_a_reset_is_an_error(netns: Path) -> None:
    async def reset(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        linger = b"\1\0\0\0\0\0\0\0"
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    made = namespaces.run_in_netns(netns, lambda: socket.create_server(("127.0.0.1", PORT)))
    async with await asyncio.start_server(reset, sock=made):
        connection = await pod_port.connect(netns, PORT)
        with pytest.raises(ConnectionError):
            await connection.read()
        connection.close()
