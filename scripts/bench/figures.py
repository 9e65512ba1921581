"""All figures of a node in one go: a private cri-shim and Debian's containerd side by side, on one registry.

Runs `lifecycle` on them with the pods that matter: bridge network under crun beside containerd with runc, and host
network with a Wasm guest beside containerd's. As root, inside `scripts/private-ns` (`scripts/bench/figures` does that).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.bench import lifecycle, memory
from scripts.bench.bed import bed
from tests.support import images, wasm
from tests.support.daemon import Daemon


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="figures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=20, help="pods per round (%(default)s)")
    parser.add_argument("--pods", type=int, default=50, help="pods while memory is measured (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    options = parser.parse_args(argv)
    with bed("figures") as ground:
        seconds = ground.daemon.start()
        idle = memory.pss(memory.resident(ground.daemon.pid, ()))
        peer = ground.peer()
        print(f"cri-shim: first answer after {seconds:.2f} s, {idle:.1f} MiB (PSS) idle\n", flush=True)
        return measure(options, ground.daemon, ground.registry, peer)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
