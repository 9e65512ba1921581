"""ExecSync latency, and the throughput of exec and port-forward: a private cri-shim beside Debian's containerd.

Both get the same client, the same image and the same pod on the host's network; a figure is the median of the rounds.
As root, inside `scripts/private-ns` (`scripts/bench/streaming` does that). Invariant: a round removes all that it made.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cri_shim.pb import api_pb2 as pb
from scripts.bench.bed import bed
from scripts.bench.report import percentile
from scripts.bench.spdy_client import Session
from tests.support.cri import Cri, Pod, container_config, pod_config

MIB = 1 << 20
UNITS = {"ExecSync true": "ms (p50)", "exec": "MiB/s", "port-forward": "MiB/s"}


@dataclass(frozen=True, slots=True)
class Target:
    """A daemon and the handler that is measured on it."""

    name: str
    socket: Path
    handler: str


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="streaming", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=40, help="ExecSync calls per round (%(default)s)")
    parser.add_argument("--mib", type=int, default=1024, help="what is streamed (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    options = parser.parse_args(argv)
    with bed("streaming") as ground:
        ground.daemon.start()
        peer, _ = ground.peer()
        image = ground.registry.push_busybox("bench/busybox:1")
        ours = ground.daemon.socket
        targets = [Target("cri-shim crun", ours, "crun"), Target("cri-shim runc", ours, "runc")]
        targets.append(Target("containerd runc", peer, "runc"))
        rounds: dict[str, list[dict[str, float]]] = {target.name: [] for target in targets}
        for number in range(options.rounds):
            for target in targets:
                print(f"round {number + 1}: {target.name}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
                rounds[target.name].append(measure(target, image, options))
    report(rounds)
    return 0


def measure(target: Target, image: str, options: argparse.Namespace) -> dict[str, float]:
    """One round on one daemon."""
    size = options.mib * MIB
    with Cri(target.socket, timeout=300) as cri:
        cri.pull(image)
        pod = cri.run_pod(pod_config(f"streaming-{os.getpid()}", network=pb.NODE), target.handler)
        try:
            container = cri.run(pod, container_config(image, "sleep", "3600"))
            cri.exec(container, ["true"])
            return {
                "ExecSync true": percentile([exec_sync(cri, container) for _ in range(options.iterations)], 50),
                "exec": size / MIB / exec_seconds(cri, container, size),
                "port-forward": size / MIB / forward_seconds(cri, pod, size),
            }
        finally:
            cri.stop_pod(pod)
            cri.remove_pod(pod)


def exec_sync(cri: Cri, container: str) -> float:
    begin = time.perf_counter()
    cri.exec(container, ["true"])
    return (time.perf_counter() - begin) * 1000


def exec_seconds(cri: Cri, container: str, size: int) -> float:
    """From the first byte that could come to the end of stdout."""
    command = ["dd", "if=/dev/zero", "bs=1M", f"count={size // MIB}"]
    request = pb.ExecRequest(container_id=container, cmd=command, stdout=True)
    session = Session(
        cri.runtime.Exec(request, timeout=60).url,
        "v4.channel.k8s.io",
        [{"streamtype": "error"}, {"streamtype": "stdout"}],
    )
    return timed(session, size)


def forward_seconds(cri: Cri, pod: Pod, size: int) -> float:
    with source(size) as port:
        request = pb.PortForwardRequest(pod_sandbox_id=pod.id, port=[port])
        of_pair = {"port": str(port), "requestid": "0"}
        session = Session(
            cri.runtime.PortForward(request, timeout=60).url,
            "portforward.k8s.io",
            [{"streamtype": "error", **of_pair}, {"streamtype": "data", **of_pair}],
        )
        return timed(session, size)


def timed(session: Session, size: int) -> float:
    begin = time.perf_counter()
    got = session.count(stream=3)
    seconds = time.perf_counter() - begin
    session.close()
    if got != size:
        raise SystemExit(f"streaming: {got} bytes came instead of {size}")
    return seconds


@contextmanager
def source(size: int) -> Iterator[int]:
    """A port of the host that sends so many bytes to its one client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            piece = bytes(MIB)
            with connection:
                for _ in range(size // MIB):
                    connection.sendall(piece)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(60)


def report(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and their ratios to the last column."""
    names = list(rounds)
    print(f"{'':26}" + "".join(f"{name:>18}" for name in names) + f"{'ratios':>14}")
    for quantity, unit in UNITS.items():
        medians = [statistics.median(found[quantity] for found in rounds[name]) for name in names]
        ratios = "  ".join(f"{value / medians[-1]:.2f}" for value in medians[:-1])
        print(f"{quantity + ', ' + unit:26}" + "".join(f"{value:18.1f}" for value in medians) + f"{ratios:>14}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
