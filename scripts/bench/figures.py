"""All figures of a node in one go: a private cri-shim and Debian's containerd side by side, on one registry.

Runs `lifecycle` on them with the pods that matter: bridge network under crun beside containerd with runc, and host
network with a Wasm guest beside containerd's. As root, inside `scripts/private-ns` (`scripts/bench/figures` does that).
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc

from scripts.bench import lifecycle, memory
from tests.support import images, wasm
from tests.support.cri import Cri
from tests.support.daemon import Daemon

PEER = Path(__file__).with_name("peer-containerd")
START_LIMIT = 30.0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="figures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=20, help="pods per round (%(default)s)")
    parser.add_argument("--pods", type=int, default=50, help="pods while memory is measured (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    options = parser.parse_args(argv)
    with ExitStack() as clean_up:
        base = Path(clean_up.enter_context(tempfile.TemporaryDirectory(prefix="cs.")))
        registry = clean_up.enter_context(images.registry(base / "registry"))
        daemon = Daemon(base / "0", settings={"log": {"level": "info"}}, cgroup_parent="/cri-shim-figures")
        clean_up.callback(daemon.close)
        seconds = daemon.start()
        idle = memory.pss(memory.resident(daemon.pid, ()))
        peer = clean_up.enter_context(containerd(base / "peer", registry, daemon.cni))
        print(f"cri-shim: first answer after {seconds:.2f} s, {idle:.1f} MiB (PSS) idle\n", flush=True)
        return measure(options, daemon, registry, (base / "peer" / "containerd.sock", peer))


def measure(options: argparse.Namespace, daemon: Daemon, registry: images.Registry, peer: tuple[Path, int]) -> int:
    """Prints one table for each kind of pod. `peer` is socket and pid."""
    busybox = registry.push_busybox("bench/busybox:1")
    guest = registry.push_wasm("bench/sleep:1", wasm.SLEEP)
    amount = [f"--{name}={getattr(options, name)}" for name in ("iterations", "rounds", "pods")]
    ours = [f"--endpoint={daemon.socket}", f"--pid={daemon.pid}"]
    theirs = [f"--vs={peer[0]}", "--vs-handler=runc", f"--vs-pid={peer[1]}", f"--vs-image={busybox}"]
    kinds = {
        "bridge network: crun, and containerd's runc": ["--handler=crun", f"--image={busybox}", f"--pull={busybox}"],
        "host network: crun, and containerd's runc": ["--handler=crun", f"--image={busybox}", "--network=host"],
        "host network: wasm, and containerd's runc": [
            *("--handler=wasm", f"--image={guest}", "--network=host", "--command=", "--vs-command=sleep 3600"),
        ],
    }
    for title, arguments in kinds.items():
        print(f"== {title}", flush=True)
        if lifecycle.main([*ours, *theirs, *amount, *arguments]) != 0:
            return 1
        print(flush=True)
    return 0


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
                    raise SystemExit(f"figures: containerd did not start:\n{(base / 'log').read_text()[-2000:]}")
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
        raise SystemExit("figures: catatonit is missing: apt install catatonit")
    layer = images.layer([images.file("pause", Path(catatonit).read_bytes(), 0o755)])
    return images.image([layer], {"Entrypoint": ["/pause", "-P"]})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
