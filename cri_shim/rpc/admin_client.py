"""The other end of the admin service: a connection of the `cri-shim` command to a daemon.

Not a CRI client. Invariant: whatever goes wrong comes as an error in words; what cannot be reached is told from what
was refused.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from cri_shim.model.errors import CriShimError, Unavailable
from cri_shim.pb import admin_pb2 as pb
from cri_shim.pb import admin_pb2_grpc, api_pb2, api_pb2_grpc
from cri_shim.rpc.server import MESSAGE_BYTES

T = TypeVar("T")

_CONNECT_SECONDS = 5.0


class RefusedError(CriShimError):
    """What the daemon answered; its words are cause and hint already."""


class AdminClient:
    """A context manager; every method is a call of `admin.proto` and blocks. Raises RefusedError, Unavailable."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _require_listener(path)
        options = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.insecure_channel(f"unix:{path.absolute()}", options=options)
        self._stub = admin_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def version(self) -> str:
        """Name and version of what answers, by the CRI: it may be another runtime."""
        request = api_pb2.VersionRequest()
        answer = self._ask(lambda: api_pb2_grpc.RuntimeServiceStub(self._channel).Version(request))
        return f"{answer.runtime_name} {answer.runtime_version}"

    def list_images(self, image: str = "") -> list[pb.Image]:
        """All images, or those that a reference names."""
        return list(self._ask(lambda: self._stub.ListImages(pb.ListImagesRequest(image=image))).images)

    def remove_image(self, image: str, *, force: bool) -> pb.RemoveImageResponse:
        """A name, or an image."""
        return self._ask(lambda: self._stub.RemoveImage(pb.RemoveImageRequest(image=image, force=force)))

    def tag_image(self, image: str, tag: str) -> str:
        """The tag in full."""
        return self._ask(lambda: self._stub.TagImage(pb.TagImageRequest(image=image, tag=tag))).tag

    def pin_image(self, image: str, *, pinned: bool) -> list[str]:
        """What the pins are on, or were."""
        return list(self._ask(lambda: self._stub.PinImage(pb.PinImageRequest(image=image, pinned=pinned))).names)

    def prune_images(self, *, dry_run: bool) -> pb.PruneImagesResponse:
        """What went, or would go."""
        return self._ask(lambda: self._stub.PruneImages(pb.PruneImagesRequest(dry_run=dry_run)))

    def pull_image(self, image: str, handler: str) -> Iterator[pb.PullImageResponse]:
        """How far it has come; the last message has the image's id."""
        request = pb.PullImageRequest(image=image, runtime_handler=handler)
        return self._listen(lambda: self._stub.PullImage(request))

    def load_images(self, path: Path, *, name: str, pin: bool) -> Iterator[pb.LoadImagesResponse]:
        """How far each image of an archive has come; one with an id is loaded."""
        request = pb.LoadImagesRequest(path=str(path.absolute()), name=name, pin=pin)
        return self._listen(lambda: self._stub.LoadImages(request))

    def save_images(self, images: Sequence[str]) -> Iterator[bytes]:
        """An archive with the images, piece by piece."""
        request = pb.SaveImagesRequest(images=images)
        return (piece.data for piece in self._listen(lambda: self._stub.SaveImages(request)))

    def check_images(self, *, repair: bool) -> Iterator[pb.CheckImagesResponse]:
        """What is found, what was done about it, and a summary at the end."""
        return self._listen(lambda: self._stub.CheckImages(pb.CheckImagesRequest(repair=repair)))

    def explain_image(self, request: pb.ExplainImageRequest) -> pb.ExplainImageResponse:
        """Which handler would run a container, and why."""
        return self._ask(lambda: self._stub.ExplainImage(request))

    def read_log(self, request: pb.ReadLogRequest) -> Iterator[pb.LogChunk]:
        """What a container has written; with `follow` until its pod ends."""
        return self._listen(lambda: self._stub.ReadLog(request))

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except grpc.RpcError as error:
            raise _explained(error, self._path) from error

    def _listen(self, call: Callable[[], Any]) -> Iterator[Any]:
        """The messages of a streamed answer; leaving early cancels the call."""
        messages = call()
        try:
            yield from messages
        except grpc.RpcError as error:
            raise _explained(error, self._path) from error
        finally:
            messages.cancel()


def _require_listener(path: Path) -> None:
    """Say at once what gRPC would say after a while, and less clearly."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_SECONDS)
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            msg, hint = f"no daemon listens on {path}", "start it, or name its socket with --listen"
        except ConnectionRefusedError:
            msg, hint = f"the daemon of {path} is gone", "start it again: systemctl start cri-shim"
        except PermissionError:
            msg, hint = f"no permission to connect to {path}", "run this as root or in the group of the socket"
        except OSError as error:
            msg, hint = f"cannot connect to {path}: {error.strerror or error}", ""
        else:
            return
    raise Unavailable(msg, hint=hint)


def _explained(error: grpc.RpcError, path: Path) -> CriShimError:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNIMPLEMENTED:
        msg = f"what listens on {path} does not know this call: {details}"
        return RefusedError(msg, hint="it is another version of cri-shim, or another runtime")
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"the daemon on {path} does not answer: {details}")
    return RefusedError(details or code.name)
