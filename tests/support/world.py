"""Everything that a pod, a container or an image of one daemon can leave behind, as values that can be compared.

Not for what a whole test run leaves (`tests.support.leftovers`). Invariant: two looks at a daemon at rest are equal.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from cri_shim.pb import api_pb2 as pb
from tests.support.cri import POLL, container_config
from tests.support.daemon import Daemon
from tests.support.expect import eventually

World = Mapping[str, frozenset[str]]

_TABLES = ("pods", "containers", "images", "layers", "pulls")
_OWN = ("state.db-shm", "state.db-wal")
"""Files of the database itself, which come and go with its connections."""
_COMPILED = "wasmtime-"
"""Directories of compiled modules: these come beside the pull of their image, some time soon, and have tests of their
own (`contract/test_image_compile.py`)."""


def settle(daemon: Daemon, images: Mapping[str, str]) -> None:
    """Lets come about what a daemon makes once and keeps: at the first container of each handler, by probes.

    `images`: one for each handler, with a program of its own.
    """
    with daemon.client() as cri:
        for handler, image in images.items():
            cri.pull(image)
            pod = cri.run_pod(daemon.pod_config(), handler)
            cri.run(pod, container_config(image))
            cri.stop_pod(pod)
            cri.remove_pod(pod)
        # It answers when the daemon has asked its runtimes what they can do.
        cri.runtime.Status(pb.StatusRequest())
    eventually(lambda: not any("probe" in line for line in daemon.traces().processes))


def world_of(daemon: Daemon) -> World:
    """What there is now, by kind: one word per thing."""
    traces = daemon.traces()
    return {
        "processes": frozenset(line for line in traces.processes if not _is_daemon(line)),
        "mounts": traces.mounts,
        "cgroups": traces.cgroups,
        "leases": frozenset(path.name for path in daemon.leases.glob("[0-9]*")),
        # Not from /sys/class/net: that shows the network namespace in which /sys was mounted.
        "links": frozenset(name for _, name in socket.if_nameindex() if name != daemon.bridge),
        "files": frozenset((*_files(daemon.root, depth=5), *_files(daemon.state, depth=4))),
        "rows": frozenset(_rows(daemon)),
    }


def difference(before: World, after: World) -> list[str]:
    """What appeared and what vanished, one line each."""
    return [
        f"{sign} {kind}: {thing}"
        for kind in before
        for sign, things in (("appeared", after[kind] - before[kind]), ("vanished", before[kind] - after[kind]))
        for thing in sorted(things)
    ]


@contextlib.contextmanager
def unchanged(daemon: Daemon, within: float = 30) -> Iterator[None]:
    """Holds the body to leave the world as it was, a moment later at the latest: helpers end after their caller."""
    before = world_of(daemon)
    yield
    deadline = time.monotonic() + within
    while (left := difference(before, world_of(daemon))) and time.monotonic() < deadline:
        time.sleep(POLL)
    assert not left, "\n".join(left)


def _is_daemon(line: str) -> bool:
    return "cri-shim serve" in line or "cri_shim/zygote" in line


def _files(top: Path, depth: int) -> Iterator[str]:
    """Paths to this depth: below are the files of images, which nobody counts one by one."""
    with contextlib.suppress(FileNotFoundError), os.scandir(top) as entries:
        for entry in entries:
            if entry.name in _OWN or entry.name.startswith(_COMPILED):
                continue
            yield entry.path
            if depth > 1 and entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), depth - 1)


def _rows(daemon: Daemon) -> Iterator[str]:
    """What the database says, also of things that are not shown to clients."""
    with contextlib.closing(sqlite3.connect(f"file:{daemon.root}/state.db?mode=ro", uri=True)) as connection:
        for table in _TABLES:
            yield from (f"{table} {key}" for (key,) in connection.execute(f"SELECT key FROM {table}"))
