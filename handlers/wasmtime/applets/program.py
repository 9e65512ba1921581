"""One run of an applet: its surroundings, and from its name to its exit status.

Not its process (`handlers.wasmtime.worker:run_exec`). Invariant: texts and exit statuses are those of coreutils where
those have the program; a reader that leaves ends it by SIGPIPE, Ctrl-C by SIGINT, as any program without handlers.
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TextIO

from handlers.wasmtime.applets import applet
from handlers.wasmtime.applets.facts import Facts
from handlers.wasmtime.applets.options import UsageError
from handlers.wasmtime.applets.processes import measured
from handlers.wasmtime.applets.view import View
from handlers.wasmtime.guest_spec import GuestSpec

_CANNOT_WRITE: Final = 1
_DIRECTORY: Final = "/"


@dataclass(frozen=True, slots=True)
class Container:
    """What an applet works on. `out` and `err` are its standard streams, and it reads from descriptor 0."""

    view: View
    spec: GuestSpec
    facts: Facts
    out: TextIO
    err: TextIO

    def complain(self, text: str) -> None:
        """On standard error, after the applet's name."""
        self.out.flush()
        self.err.write(f"{self.facts.command[0]}: {text}\n")

    def failed(self, what: str, error: OSError) -> None:
        """Likewise, in the words of coreutils."""
        self.complain(f"{what}: {error.strerror}")


Program = Callable[[Container, Sequence[str]], int]
"""Takes the words after its name; returns its exit status."""

_PROGRAMS: Final = {
    "files": ("cat", "df", "ls", "stat", "test"),
    "about": ("env", "id", "printenv", "ps", "pwd"),
    "archive": ("tar",),
    "trivial": ("echo", "false", "sleep", "true"),
}
"""By the module that has them."""


def prepared(spec: GuestSpec, facts: Facts) -> Callable[[], int]:
    """Open and load all that it needs of the host, to be run when the host's files are out of reach. OSError."""
    view = View(spec.preopens, dict(spec.env).get("PWD", _DIRECTORY))
    name = applet(facts.command[0])
    module = next(module for module, names in _PROGRAMS.items() if name in names)
    program: Program = getattr(importlib.import_module(f"handlers.wasmtime.applets.{module}"), f"run_{name}")
    container = Container(view, spec, measured(facts), _stream(1), _stream(2))
    return lambda: _run(program, container)


def _stream(descriptor: int) -> TextIO:
    return open(descriptor, "w", encoding="utf-8", errors="surrogateescape", closefd=False)


def _run(program: Program, container: Container) -> int:
    for number in (signal.SIGPIPE, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        status = program(container, list(container.facts.command[1:]))
        container.out.flush()
        container.err.flush()
    except UsageError as error:
        container.complain(str(error))
        container.err.flush()
        return _usage_status(applet(container.facts.command[0]))
    except OSError as error:
        os.write(2, f"{container.facts.command[0]}: write error: {error.strerror}\n".encode())
        return _CANNOT_WRITE
    return status


def _usage_status(name: str) -> int:
    """As coreutils and dash have it."""
    return {"ls": 2, "tar": 2, "test": 2, "printenv": 2, "env": 125}.get(name, 1)
