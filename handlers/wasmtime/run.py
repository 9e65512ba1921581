"""One run of a module, wherever it is: what the handler does with it. A protocol, no behaviour."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Protocol

from cri_shim.kernel.byte_streams import WriteEnd
from cri_shim.model.handler import HandlerStats
from cri_shim.pb import api_pb2 as pb
from handlers.wasmtime.guest_spec import GuestSpec


class Run(Protocol):
    """All methods belong to the event loop."""

    spec: GuestSpec
    inputs: set[WriteEnd]
    """The ends of its standard input that clients have open."""

    def stop(self, signal: int) -> None:
        """End it, whatever it does. The first signal counts; ended already is success."""
        ...

    async def update(
        self, spec: GuestSpec, now: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources
    ) -> None:
        """Change the limits to those of `spec` and `wanted`."""
        ...

    async def reopen_log(self) -> None:
        """New entries go to a new file. OSError, FailedPrecondition: the old one is written on."""
        ...

    async def tap(self, end: socket.socket) -> None:
        """Copy the output from now on to `end`, which is the run's to close; see `LogPump.tap`."""
        ...

    async def terminal(self) -> int:
        """The master end of its terminal, the caller's to close; -1 without one. FailedPrecondition: it has ended."""
        ...

    async def end_input(self) -> None:
        """The daemon's clients have no more input, and there will be no others."""
        ...

    def stats(self) -> HandlerStats | None:
        """None when its cgroup tells."""
        ...

    def info(self) -> Mapping[str, object]:
        """What verbose status shows of it."""
        ...
