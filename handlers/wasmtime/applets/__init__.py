"""Small programs that every Wasm container has for exec, in Python: what one looks at a container with.

They run where a further module would (`handlers.wasmtime.worker:run_exec`): as the container's user, in its cgroup,
with its preopens and nothing else of the node. Here are only their names: the daemon never loads the rest. A module of
the same name in the image comes first.
"""

from __future__ import annotations

import posixpath
from typing import Final

NAMES: Final = (
    *("cat", "df", "echo", "env", "false", "id", "ls", "printenv", "ps", "pwd", "sleep", "stat", "tar", "test", "true"),
)
_DIRECTORIES: Final = frozenset({"", "/bin", "/usr/bin"})


def applet(word: str) -> str:
    """The applet that a command's first word means: its name, alone or where Linux images have it. Empty = none."""
    directory, name = posixpath.split(word)
    return name if name in NAMES and directory in _DIRECTORIES else ""
