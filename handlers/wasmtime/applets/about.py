"""env, printenv, pwd, id and ps, and what `stat` says of a container: what a module is given besides its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from handlers.wasmtime.applets.options import options
from handlers.wasmtime.applets.program import Container

_NOT_FOUND: Final = 127
_NUMBER: Final = 2
"""The field of a line of passwd or group that has its number."""
_SECOND: Final = 1_000_000_000


def run_env(container: Container, words: Sequence[str]) -> int:
    """The variables of the module. It runs nothing: there is nothing to run but modules and applets."""
    if words:
        container.complain(f"{words[0]!r}: only prints the environment here, and runs no command")
        return _NOT_FOUND
    for name, value in container.spec.env:
        container.out.write(f"{name}={value}\n")
    return 0


def run_printenv(container: Container, words: Sequence[str]) -> int:
    """The values of the variables named, or all; 1 when one is not set."""
    if not words:
        return run_env(container, ())
    variables, status = dict(container.spec.env), 0
    for name in words:
        if name in variables:
            container.out.write(f"{variables[name]}\n")
        else:
            status = 1
    return status


def run_pwd(container: Container, words: Sequence[str]) -> int:
    """Where relative names count from."""
    options(words, "LP")
    container.out.write(f"{container.view.normal('.')}\n")
    return 0


def run_id(container: Container, words: Sequence[str]) -> int:
    """User and groups, as numbers. Options: -u, -g, -G; -n beside them: the names that the image has for them."""
    found, _ = options(words, "ugGn")
    user, groups = str(os.geteuid()), [str(group) for group in dict.fromkeys((os.getegid(), *os.getgroups()))]
    which = {"-u": ("/etc/passwd", [user]), "-g": ("/etc/group", groups[:1]), "-G": ("/etc/group", groups)}
    for option, (database, numbers) in which.items():
        if option in found:
            names = _names(container, database) if "-n" in found else {}
            container.out.write(f"{' '.join(names.get(number, number) for number in numbers)}\n")
            return 0
    container.out.write(f"uid={user} gid={groups[0]} groups={','.join(groups)}\n")
    return 0


def _names(container: Container, database: str) -> dict[str, str]:
    """By number, as passwd(5) and group(5) have them. Without the file there are none."""
    try:
        with (
            container.view.opened(database, os.O_RDONLY | os.O_NONBLOCK) as descriptor,
            open(descriptor, encoding="utf-8", errors="surrogateescape", closefd=False) as file,
        ):
            fields = [line.split(":") for line in file]
    except OSError:
        return {}
    return {entry[2]: entry[0] for entry in fields if len(entry) > _NUMBER}


def run_ps(container: Container, words: Sequence[str]) -> int:
    """All that runs in the container, whatever the options are: 1 is its module."""
    del words
    user = os.geteuid()
    container.out.write(f"{'PID':>5} {'USER':<8} {'TIME':>8} {'RSS/KiB':>9} COMMAND\n")
    for process in container.facts.processes:
        seconds = process.cpu_ns // _SECOND
        spent = f"{seconds // 60}:{seconds % 60:02}"
        container.out.write(f"{process.pid:>5} {user:<8} {spent:>8} {process.memory // 1024:>9} {process.command}\n")
    return 0


def describe(container: Container) -> str:
    """Module, placement, limits and preopens, one a line."""
    facts, spec = container.facts, container.spec
    ports = ", ".join(str(port) for port in facts.listen)
    lines = [
        f"      Module: {facts.module}",
        f"   Placement: {facts.placement}{f': {facts.why}' if facts.why else ''}",
        f"Memory limit: {f'{facts.memory_limit} bytes' if facts.memory_limit else 'none'}",
        f"   CPU limit: {facts.cpu_limit or 'none'}",
        f"  Listens on: {ports or 'nothing'}",
        *(f"     Preopen: {it.guest}, {'read-only' if it.readonly else 'read-write'}" for it in spec.preopens),
    ]
    return "\n".join(lines) + "\n"
