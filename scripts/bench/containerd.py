"""Debian's containerd, the peer, on a private directory.

Not what is asked of it. Invariant: its pods are gone at the end, as it is itself.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from tests.support import images
from tests.support.cri import Cri

PEER = Path(__file__).with_name("peer-containerd")
START_LIMIT = 30.0


@contextmanager
def containerd(base: Path, registry: images.Registry, cni: Path) -> Iterator[int]:
    """Debian's containerd on a private directory; its pid."""
    pause = registry.push("bench/pause:1", pause_image())
    base.mkdir(exist_ok=True)
    socket = base / "containerd.sock"
    command = [str(PEER), str(base), "--sandbox-image", pause, "--registry", registry.address, "--cni", str(cni)]
    with (base / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + START_LIMIT
            while not socket.is_socket():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"containerd did not start:\n{(base / 'log').read_text()[-2000:]}")
                time.sleep(0.05)
            yield process.pid
        finally:
            with contextlib.suppress(grpc.RpcError), Cri(socket) as cri:
                cri.remove_all_pods()
            process.terminate()


def pause_image() -> images.Image:
    """What containerd runs in each pod: a program that only waits and reaps, here catatonit."""
    catatonit = shutil.which("catatonit")
    if catatonit is None:
        raise SystemExit("catatonit is missing: apt install catatonit")
    layer = images.layer([images.file("pause", Path(catatonit).read_bytes(), 0o755)])
    return images.image([layer], {"Entrypoint": ["/pause", "-P"]})
