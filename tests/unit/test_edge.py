"""The edge, over a real socket: codes, texts, refusals before recovery, and requests that are no messages."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio
import pytest
from structlog.testing import capture_logs

from cri_shim.model.errors import (
    CannotExecute,
    CriShimError,
    FailedPrecondition,
    NotFound,
    NotReady,
    PullError,
    Unavailable,
    Unimplemented,
    WrongState,
)
from cri_shim.pb import admin_pb2, api_pb2_grpc
from cri_shim.pb import api_pb2 as pb
from cri_shim.rpc.edge import Gate
from cri_shim.rpc.server import Server
from cri_shim.rpc.status import status_of

ReadLog: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[admin_pb2.ReadLogRequest, admin_pb2.LogChunk]"


async def _version(request: pb.VersionRequest) -> pb.VersionResponse:
    if request.version == "defect":
        raise KeyError("secret detail")
    return pb.VersionResponse(version="v" * len(request.version))


async def _stop(request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
    raise NotFound(f"no {request.pod_sandbox_id}", hint="look again")


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    gate = Gate()
    server = Server(tmp_path / "s", {"Version": _version, "StopPodSandbox": _stop}, {}, gate)
    await server.start()
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o660
    gate.open()
    options = [("grpc.max_receive_message_length", 32 << 20), ("grpc.max_send_message_length", 32 << 20)]
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s", options=options) as opened:
        yield opened
    await server.stop(0)
    assert not (tmp_path / "s").exists()


async def test_answers_and_large_messages(channel: grpc.aio.Channel) -> None:
    stub = api_pb2_grpc.RuntimeServiceStub(channel)
    answer = await stub.Version(pb.VersionRequest(version="x" * (10 << 20)))
    assert len(answer.version) == 10 << 20


async def test_domain_errors_carry_code_cause_and_hint(channel: grpc.aio.Channel) -> None:
    stub = api_pb2_grpc.RuntimeServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id="abc"))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no abc; look again")


async def test_defects_show_no_details(channel: grpc.aio.Channel) -> None:
    stub = api_pb2_grpc.RuntimeServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Version(pb.VersionRequest(version="defect"))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (caught.value.details() or "")


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (WrongState("c is exited"), "info"),
        (NotReady("p is not ready"), "info"),
        (CannotExecute("no such program", exit_status=127), "info"),
        (NotFound("no c"), "info"),
        (FailedPrecondition("no conmon"), "error"),
        (Unavailable("no network"), "error"),
    ],
)
async def test_what_is_the_clients_own_is_no_error_in_the_log(tmp_path: Path, error: CriShimError, level: str) -> None:
    async def fail(request: pb.StartContainerRequest) -> pb.StartContainerResponse:
        raise error

    gate = Gate()
    server = Server(tmp_path / "s", {"StartContainer": fail}, {}, gate)
    await server.start()
    gate.open()
    with capture_logs() as logs:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
            with pytest.raises(grpc.aio.AioRpcError, match=str(error)):
                await api_pb2_grpc.RuntimeServiceStub(channel).StartContainer(pb.StartContainerRequest())
    await server.stop(0)
    assert [entry["log_level"] for entry in logs if entry["event"] == "call failed"] == [level]


async def test_what_is_not_there_is_unimplemented_by_name(channel: grpc.aio.Channel) -> None:
    stub = api_pb2_grpc.RuntimeServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError, match=r"CheckpointContainer") as caught:
        await stub.CheckpointContainer(pb.CheckpointContainerRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.aio.AioRpcError, match="StreamContainers") as caught:
        async for _ in stub.StreamContainers(pb.StreamContainersRequest()):
            pass
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("body", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["garbage", "not UTF-8"])
async def test_malformed_requests_are_invalid_arguments(channel: grpc.aio.Channel, body: bytes) -> None:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/runtime.v1.RuntimeService/Version")
    with pytest.raises(grpc.aio.AioRpcError, match="VersionRequest") as caught:
        await call(body)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_no_request_may_hold_is_refused_before_any_flow(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=r"version: 'a.+b' contains a NUL") as caught:
        await api_pb2_grpc.RuntimeServiceStub(channel).Version(pb.VersionRequest(version="a\0b"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_unavailable_until_the_gate_opens(tmp_path: Path) -> None:
    server = Server(tmp_path / "s", {"Version": _version}, {}, Gate())
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="not recovered") as caught:
            await api_pb2_grpc.RuntimeServiceStub(channel).Version(pb.VersionRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.stop(0)


async def test_a_socket_in_use_is_never_taken(tmp_path: Path) -> None:
    first = Server(tmp_path / "s", {}, {}, Gate())
    await first.start()
    with pytest.raises(FailedPrecondition, match="another process"):
        await Server(tmp_path / "s", {}, {}, Gate()).start()
    await first.stop(0)
    (tmp_path / "s").write_text("not a socket")
    with pytest.raises(FailedPrecondition, match="no socket"):
        await Server(tmp_path / "s", {}, {}, Gate()).start()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (PullError("RegistryUnavailable: down"), grpc.StatusCode.UNKNOWN, "RegistryUnavailable: down"),
        (Unimplemented("x"), grpc.StatusCode.UNIMPLEMENTED, "x"),
        (OSError(errno.ENOSPC, "No space left on device", "/f"), grpc.StatusCode.RESOURCE_EXHAUSTED, "No space left"),
        (OSError(errno.EPERM, "mount: no", "/f"), grpc.StatusCode.INTERNAL, "mount: no: /f"),
        (OSError(errno.EPERM, None), grpc.StatusCode.INTERNAL, "Operation not permitted"),
        (CriShimError("y" * 10_000), grpc.StatusCode.INTERNAL, "y" * 3500),
        (CriShimError("a\nb\n"), grpc.StatusCode.INTERNAL, "a b"),
    ],
)
def test_status_table(error: Exception, code: grpc.StatusCode, text: str) -> None:
    assert status_of(error)[0] is code
    assert status_of(error)[1].startswith(text)


@pytest.mark.parametrize("character", ["y", "\u00fc", "\U0001f600", "\x7f"])
async def test_long_texts_arrive(tmp_path: Path, character: str) -> None:
    async def stop(request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
        raise NotFound(character * 100_000)

    gate = Gate()
    gate.open()
    server = Server(tmp_path / "s", {"StopPodSandbox": stop}, {}, gate)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s", options=[("grpc.max_metadata_size", 8192)]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api_pb2_grpc.RuntimeServiceStub(channel).StopPodSandbox(pb.StopPodSandboxRequest())
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (caught.value.details() or "").startswith(character * 250)
    await server.stop(0)


_closed = threading.Event()
"""Set when a stream that is followed ends."""


async def _read_log(request: admin_pb2.ReadLogRequest) -> AsyncGenerator[admin_pb2.LogChunk]:
    yield admin_pb2.LogChunk(data=b"first")
    if not request.follow:
        raise NotFound("no more", hint="look again")
    try:
        await asyncio.Event().wait()
    finally:
        _closed.set()


@pytest.fixture
async def streaming(tmp_path: Path) -> AsyncIterator[tuple[Server, ReadLog]]:
    gate = Gate()
    server = Server(tmp_path / "s", {}, {}, gate, admin={"ReadLog": _read_log})
    await server.start()
    gate.open()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as opened:
        yield (
            server,
            opened.unary_stream(
                "/crishim.admin.v1.Admin/ReadLog",
                request_serializer=admin_pb2.ReadLogRequest.SerializeToString,
                response_deserializer=admin_pb2.LogChunk.FromString,
            ),
        )
    await server.stop(0)


async def test_a_stream_ends_with_the_words_of_its_error(streaming: tuple[Server, ReadLog]) -> None:
    _, read_log = streaming
    chunks = aiter(read_log(admin_pb2.ReadLogRequest()))
    assert (await anext(chunks)).data == b"first"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(chunks)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no more; look again")


async def test_streams_do_not_hold_up_the_stop(streaming: tuple[Server, ReadLog]) -> None:
    server, read_log = streaming
    chunks = aiter(read_log(admin_pb2.ReadLogRequest(follow=True)))
    assert (await anext(chunks)).data == b"first"
    async with asyncio.timeout(30):
        await server.stop(60)
    with pytest.raises(grpc.aio.AioRpcError, match="the daemon is stopping") as caught:
        await anext(chunks)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_leaves_ends_its_stream(streaming: tuple[Server, ReadLog]) -> None:
    _, read_log = streaming
    _closed.clear()
    call = read_log(admin_pb2.ReadLogRequest(follow=True))
    assert (await anext(aiter(call))).data == b"first"
    call.cancel()
    assert await asyncio.to_thread(_closed.wait, 30)
