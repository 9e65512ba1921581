"""What the host functions of one component share: its streams, its directories, its resources, and where it waits.

Not the functions. All that is opened here is open before the worker leaves the host's files behind, and closed when the
guest has ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Final, Protocol

from cri_shim.model.errors import FailedPrecondition
from handlers.wasmtime.guest_spec import GuestSpec
from handlers.wasmtime.output import Streams
from handlers.wasmtime.wasip2.resources import Table
from handlers.wasmtime.wasip2.waiter import Waiter

_TERMINAL: Final = "/proc/self/fd/0"


class Instance(Protocol):
    """What a host function may do to who has called it."""

    def leave(self, code: int) -> None:
        """It ends by itself, with this code."""
        ...

    def fail(self, error: Exception) -> None:
        """A host function has a defect."""
        ...


class HostedGuest(Instance, Protocol):
    """What host functions ask of a guest."""

    spec: GuestSpec

    def resting(self) -> AbstractContextManager[None]:
        """It waits in the block."""
        ...


class Running(threading.local):
    """The instance that runs in the calling thread, and its objects; where nothing else is said, those of the guest."""

    def __init__(self, instance: Instance, table: Table) -> None:
        self.instance = instance
        self.table = table


@dataclass(frozen=True, slots=True)
class Directory:
    """A preopened directory: a descriptor (O_PATH) and the name that the guest has for it."""

    fd: int
    name: str
    readonly: bool


class Listeners:
    """The sockets that it listens on. Any thread."""

    def __init__(self) -> None:
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()

    def add(self, sock: socket.socket) -> None:
        """It listens."""
        with self._lock:
            self._sockets.add(sock)

    def discard(self, sock: socket.socket) -> None:
        """It is about to be closed."""
        with self._lock:
            self._sockets.discard(sock)

    def end(self) -> None:
        """No more connections: who waits for one gets an error."""
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RD)


@dataclass(slots=True)
class World:
    """Of one guest. The descriptors of the streams do not block; no `stdin` = it is at its end from the start."""

    guest: HostedGuest
    waiter: Waiter
    running: Running
    listeners: Listeners = field(default_factory=Listeners)
    stdin: int | None = None
    stdout: int = -1
    stderr: int = -1
    directories: tuple[Directory, ...] = ()

    @property
    def table(self) -> Table:
        """The objects of the instance that runs in the calling thread."""
        return self.running.table

    def stop(self) -> None:
        """End every wait, now and from now on. Any thread."""
        self.waiter.stop()

    def close_listeners(self) -> None:
        """No more connections: who waits for one gets an error. Any thread."""
        self.listeners.end()

    def open(self, output: Streams, resources: ExitStack) -> None:
        """Open streams and directories. FailedPrecondition names what cannot be opened."""
        spec = self.guest.spec
        self.stdout = _opened(output.stdout_path, os.O_WRONLY, resources)
        self.stderr = _opened(output.stderr_path, os.O_WRONLY, resources)
        source = _TERMINAL if spec.terminal else spec.stdin
        if source:
            self.stdin = _opened(source, os.O_RDONLY, resources)
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
    world = World(guest, waiter, Running(guest, Table()))
    resources.callback(world.table.close)
    resources.callback(waiter.stop)  # what is closed at the end waits for nothing
    return world


def _opened(path: str, flags: int, resources: ExitStack) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    resources.callback(os.close, fd)
    return fd
