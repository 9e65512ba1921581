"""What the host functions of one component share: its streams, its directories, its resources, and where it waits.

Not the functions. All that is opened here is open before the worker leaves the host's files behind, and closed when the
guest has ended.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from cri_shim.model.errors import FailedPrecondition
from handlers.wasmtime.guest_spec import GuestSpec
from handlers.wasmtime.output import Output, Plain
from handlers.wasmtime.wasip2.resources import Table
from handlers.wasmtime.wasip2.waiter import Waiter


class HostedGuest(Protocol):
    """What host functions ask of a guest."""

    spec: GuestSpec

    def resting(self) -> AbstractContextManager[None]:
        """It waits in the block."""
        ...

    def leave(self, code: int) -> None:
        """It ends by itself, with this code."""
        ...

    def fail(self, error: Exception) -> None:
        """A host function has a defect."""
        ...


@dataclass(frozen=True, slots=True)
class Directory:
    """A preopened directory: a descriptor (O_PATH) and the name that the guest has for it."""

    fd: int
    name: str
    readonly: bool


@dataclass(slots=True)
class World:
    """Of one guest. The descriptors of the streams do not block; no `stdin` = it is at its end from the start."""

    guest: HostedGuest
    waiter: Waiter
    table: Table = field(default_factory=Table)
    stdin: int | None = None
    stdout: int = -1
    stderr: int = -1
    directories: tuple[Directory, ...] = ()

    def open(self, output: Output | Plain, resources: ExitStack) -> None:
        """Open streams and directories. FailedPrecondition names what cannot be opened."""
        spec = self.guest.spec
        self.stdout = _opened(output.stdout_path, os.O_WRONLY, resources)
        self.stderr = _opened(output.stderr_path, os.O_WRONLY, resources)
        if spec.stdin:
            self.stdin = _opened(spec.stdin, os.O_RDONLY, resources)
        directories = []
        for preopen in spec.preopens:
            try:
                fd = _opened(preopen.host, os.O_PATH | os.O_DIRECTORY, resources)
            except OSError as error:
                msg = f"mounts: cannot open the directory {preopen.host} as {preopen.guest}: {error.strerror}"
                raise FailedPrecondition(msg) from None
            directories.append(Directory(fd, preopen.guest, preopen.readonly))
        self.directories = tuple(directories)


def new_world(guest: HostedGuest, resources: ExitStack) -> World:
    """A world whose resources are closed when `resources` are."""
    waiter = Waiter(guest.resting)
    resources.callback(waiter.close)
    world = World(guest, waiter)
    resources.callback(world.table.close)
    return world


def _opened(path: str, flags: int, resources: ExitStack) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    resources.callback(os.close, fd)
    return fd
