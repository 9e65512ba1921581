"""The edge: every RPC passes here, and only here are errors converted, outcomes logged and calls refused.

Not a flow. Invariant: a client never sees an exception's type or trace, and the log has one line for each failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, cast

import grpc
import grpc.aio
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from cri_shim.log import get_logger
from cri_shim.model.errors import CannotExecute, CriShimError, NotReady, Unavailable, WrongState
from cri_shim.rpc.status import status_of
from cri_shim.spec import wellformed

log = get_logger()

Flow = Callable[[Any], Awaitable[Message]]
StreamFlow = Callable[[Any], AsyncGenerator[Message]]
"""Of a method whose answer is a stream; its generator is closed when the client leaves."""
Context = grpc.aio.ServicerContext[Any, Any]
_SLOW_SECONDS = 10.0
_numbers = itertools.count(1)
"""Of calls, for the log: what belongs to one call has one number, also when another call joins its work."""
_CLIENT_FAULTS: Final = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.CANCELLED,
}
_CLIENT_ERRORS: Final = (WrongState, NotReady, CannotExecute)
"""Likewise, of codes that can be the node's fault too. Neither is an error in the daemon's log."""


class Gate:
    """Refuses every call until recovery is done, and again while the daemon stops, which ends the streams."""

    def __init__(self) -> None:
        self.refusal = "the daemon is starting, its state is not recovered yet"
        self.closing = asyncio.Event()

    def open(self) -> None:
        """Let calls in."""
        self.refusal = ""

    def close(self) -> None:
        """Refuse calls from now on."""
        self.refusal = "the daemon is stopping"
        self.closing.set()


class _Malformed:
    """A request that is no valid message: refused by name, where gRPC would answer INTERNAL."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def service_handler(
    service: ServiceDescriptor, flows: Mapping[str, Flow | StreamFlow], gate: Gate
) -> grpc.GenericRpcHandler:
    """All methods of a service; those without a flow answer UNIMPLEMENTED."""
    unknown = set(flows) - {method.name for method in service.methods}
    if unknown:
        msg = f"{service.full_name} has no {', '.join(sorted(unknown))}"
        raise ValueError(msg)
    methods = {method.name: _method(method, flows.get(method.name), gate) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def _method(method: MethodDescriptor, flow: Flow | StreamFlow | None, gate: Gate) -> grpc.RpcMethodHandler[Any, Any]:
    parse = _parser(GetMessageClass(method.input_type))
    maker = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    if flow is None:
        return maker(_refusal(method), request_deserializer=parse)
    guarded: Callable[[Any, Context], Any] = (
        _guarded_stream(method.name, cast("StreamFlow", flow), gate)
        if method.server_streaming
        else _guarded(method.name, cast("Flow", flow), gate)
    )
    return maker(guarded, request_deserializer=parse, response_serializer=_serialize)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _parser(kind: type[Message]) -> Callable[[bytes], Message | _Malformed]:
    def parse(data: bytes) -> Message | _Malformed:
        try:
            return kind.FromString(data)
        except DecodeError:
            name = kind.DESCRIPTOR.name
            return _Malformed(f"the request is no valid {name}: broken encoding, or a string that is not UTF-8")

    return parse


def _refusal(method: MethodDescriptor) -> Callable[[Any, Context], Awaitable[None]]:
    async def refuse(request: object, context: Context) -> None:
        del request
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, f"{method.name} is not implemented by this version of cri-shim"
        )

    return refuse


def _guarded(name: str, flow: Flow, gate: Gate) -> Callable[[Any, Context], Awaitable[Message]]:
    async def call(request: Any, context: Context) -> Message:
        await _admit(name, request, gate, context)
        started = time.monotonic()
        try:
            wellformed.check(request)
            response = await flow(request)
        except Exception as error:
            await _fail(error, context, time.monotonic() - started)
            raise
        elapsed = time.monotonic() - started
        if elapsed > _SLOW_SECONDS:
            log.warning("slow call", seconds=round(elapsed, 3))
        else:
            log.debug("call", seconds=round(elapsed, 4))
        return response

    return call


def _guarded_stream(name: str, flow: StreamFlow, gate: Gate) -> Callable[[Any, Context], AsyncIterator[Message]]:
    """As above; how long a stream lasts is the client's affair."""

    async def call(request: Any, context: Context) -> AsyncIterator[Message]:
        await _admit(name, request, gate, context)
        started = time.monotonic()
        try:
            wellformed.check(request)
            async with (
                contextlib.aclosing(flow(request)) as messages,
                contextlib.aclosing(_until_closing(messages, gate)) as shown,
            ):
                async for message in shown:
                    yield message
        except Exception as error:
            await _fail(error, context, time.monotonic() - started)
            raise
        log.debug("call", seconds=round(time.monotonic() - started, 4))

    return call


async def _until_closing(messages: AsyncGenerator[Message], gate: Gate) -> AsyncGenerator[Message]:
    """The messages; Unavailable as soon as the gate closes: who follows a log must not hold up the stop."""
    closing = asyncio.ensure_future(gate.closing.wait())
    following: asyncio.Future[Message] | None = None
    try:
        while True:
            following = asyncio.ensure_future(_next(messages))
            await asyncio.wait((following, closing), return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                raise Unavailable(gate.refusal)
            try:
                message = following.result()
            except StopAsyncIteration:
                return
            yield message
    finally:
        for waiting in (closing, following):
            if waiting is not None and not waiting.done():
                waiting.cancel()
                # The generator can be closed only when nobody waits in it.
                await asyncio.wait((waiting,))


async def _next(messages: AsyncGenerator[Message]) -> Message:
    return await anext(messages)


async def _admit(name: str, request: Any, gate: Gate, context: Context) -> None:
    """Refuse what can be refused unseen, and give the call its number in the log."""
    if gate.refusal:
        await context.abort(grpc.StatusCode.UNAVAILABLE, gate.refusal)
    if isinstance(request, _Malformed):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.reason)
    structlog.contextvars.bind_contextvars(rpc=name, request=f"{next(_numbers):x}", **_ids(request))


async def _fail(error: Exception, context: Context, seconds: float) -> None:
    code, details = status_of(error)
    _log_failure(error, code, details, seconds)
    await context.abort(code, details)


def _ids(request: Message) -> dict[str, str]:
    """The ids that a request names, short, for every log line below this call."""
    ids = {}
    for field, key in (("pod_sandbox_id", "pod"), ("container_id", "container")):
        value = getattr(request, field, "")
        if value:
            ids[key] = value[:13]
    return ids


def _log_failure(error: Exception, code: grpc.StatusCode, details: str, seconds: float) -> None:
    fields = {"code": code.name, "error": details, "seconds": round(seconds, 3)}
    if isinstance(error, CriShimError | OSError):
        is_clients = code in _CLIENT_FAULTS or isinstance(error, _CLIENT_ERRORS)
        (log.info if is_clients else log.error)("call failed", **fields)
    else:
        # A defect of ours: the trace is for whoever mends it, in the log only.
        log.error("call failed", exc_info=error, **fields)
