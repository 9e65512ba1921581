"""`wasi:cli`: arguments, environment, standard streams, the end."""

from __future__ import annotations

import os
from typing import Final, NoReturn

from handlers.wasmtime.wasip2.interface import Exited, Interface
from handlers.wasmtime.wasip2.resources import Resource
from handlers.wasmtime.wasip2.streams import FdInput, FdOutput, InputStream, NoInput, OutputStream
from handlers.wasmtime.wasip2.world import World

_WORKING_DIRECTORY: Final = "PWD"


class TerminalInput(Resource, resource=True):
    """`terminal-input`."""


class TerminalOutput(Resource, resource=True):
    """`terminal-output`."""


def environment(world: World) -> Interface:
    """`wasi:cli/environment`. The working directory is where the container's variable says."""
    spec = world.guest.spec
    return Interface(
        functions={
            "get-environment": lambda: spec.env,
            "get-arguments": lambda: spec.argv,
            "initial-cwd": lambda: dict(spec.env).get(_WORKING_DIRECTORY),
        }
    )


def leaving(_world: World) -> Interface:
    """`wasi:cli/exit`."""

    def leave(status: tuple[str, None]) -> NoReturn:
        raise Exited(0 if status[0] == "ok" else 1)

    def leave_with_code(code: int) -> NoReturn:
        raise Exited(code)

    return Interface(functions={"exit": leave, "exit-with-code": leave_with_code})


def stdin(world: World) -> Interface:
    """`wasi:cli/stdin`."""

    def get() -> InputStream:
        return NoInput(world.waiter) if world.stdin is None else FdInput(world.waiter, world.stdin)

    return Interface({"input-stream": InputStream}, {"get-stdin": get})


def stdout(world: World) -> Interface:
    """`wasi:cli/stdout`."""
    return Interface({"output-stream": OutputStream}, {"get-stdout": lambda: FdOutput(world.waiter, world.stdout)})


def stderr(world: World) -> Interface:
    """`wasi:cli/stderr`."""
    return Interface({"output-stream": OutputStream}, {"get-stderr": lambda: FdOutput(world.waiter, world.stderr)})


def terminal_input(_world: World) -> Interface:
    """`wasi:cli/terminal-input`."""
    return Interface({"terminal-input": TerminalInput})


def terminal_output(_world: World) -> Interface:
    """`wasi:cli/terminal-output`."""
    return Interface({"terminal-output": TerminalOutput})


def terminal_stdin(world: World) -> Interface:
    """`wasi:cli/terminal-stdin`."""

    def get() -> TerminalInput | None:
        return TerminalInput() if world.stdin is not None and os.isatty(world.stdin) else None

    return Interface({"terminal-input": TerminalInput}, {"get-terminal-stdin": get})


def terminal_stdout(world: World) -> Interface:
    """`wasi:cli/terminal-stdout`."""
    return Interface({"terminal-output": TerminalOutput}, {"get-terminal-stdout": lambda: _terminal(world.stdout)})


def terminal_stderr(world: World) -> Interface:
    """`wasi:cli/terminal-stderr`."""
    return Interface({"terminal-output": TerminalOutput}, {"get-terminal-stderr": lambda: _terminal(world.stderr)})


def _terminal(fd: int) -> TerminalOutput | None:
    return TerminalOutput() if os.isatty(fd) else None
