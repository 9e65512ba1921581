"""What a hundred exec sessions at once, a megabyte each way, do to the daemon's loop.

Every byte is looked at. Lag is how late the loop comes to what is due, each millisecond; its own lag is that without
the time in which its thread was ready and others had the processors: clients, runtimes, whatever runs on the machine. A
turn is what the loop does without looking at what is due, in processor time. The clients give way, as they are not on
the node; all files are in memory, as below /run. As root, inside `scripts/private-ns` (`scripts/bench/loop-lag` does
that).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cri_shim.pb import api_pb2 as pb
from scripts.bench.bed import bed
from scripts.bench.lag import percentile
from scripts.bench.watched_daemon import REPORT
from tests.support import daemon as daemons
from tests.support.cri import Cri, container_config, pod_config
from tests.support.streaming_client import SpdyClient

WATCHED = Path(__file__).with_name("watched-daemon")
MEMORY = "/dev/shm"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="loop-lag", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--kib", type=int, default=1024, help="each way in each session (%(default)s)")
    parser.add_argument("--handler", default="crun", help="(%(default)s)")
    options = parser.parse_args(argv)
    with bed("lag", directory=MEMORY) as ground:
        daemon = ground.daemon
        figures = ground.base / "figures"
        os.environ[REPORT] = str(figures)
        daemons.PROGRAM = WATCHED  # type: ignore[misc]
        daemon.start()
        os.nice(10)
        with Cri(daemon.socket, timeout=300) as cri:
            image = ground.registry.push_busybox("bench/busybox:1")
            cri.pull(image)
            pod = cri.run_pod(pod_config("lag", network=pb.NODE), options.handler)
            container = cri.run(pod, container_config(image, "sleep", "3600"))
            asyncio.run(sessions(cri, container, 1, 1024))  # loads what the first session loads
            os.kill(daemon.pid, signal.SIGUSR1)
            begin = time.monotonic()
            asyncio.run(sessions(cri, container, options.sessions, options.kib << 10))
            seconds = time.monotonic() - begin
            os.kill(daemon.pid, signal.SIGUSR2)
            while not figures.exists():
                time.sleep(0.01)
            report(json.loads(figures.read_text()), seconds)
            cri.remove_all_pods()
    return 0


async def sessions(cri: Cri, container: str, number: int, size: int) -> None:
    request = pb.ExecRequest(container_id=container, cmd=["cat"], stdin=True, stdout=True)
    answers = await asyncio.gather(*(asyncio.to_thread(cri.runtime.Exec, request) for _ in range(number)))
    await asyncio.gather(*(session(answer, size, seed) for seed, answer in enumerate(answers)))


async def session(answer: pb.ExecResponse, size: int, seed: int) -> None:
    """Through `cat` and back. SystemExit when it is not the same."""
    content = random.Random(seed).randbytes(size)
    client = await SpdyClient.open(answer.url)
    for role in ("error", "stdin", "stdout"):
        client.stream(role)

    async def send() -> None:
        await client.send("stdin", content)
        client.end("stdin")

    sending = asyncio.create_task(send())
    await client.until_goaway()
    with contextlib.suppress(ConnectionError):
        await sending
    if hashlib.sha256(client.received("stdout")).digest() != hashlib.sha256(content).digest():
        raise SystemExit(f"loop-lag: session {seed}: {len(client.received('stdout'))} bytes, and not the same")
    if client.status()["status"] != "Success":
        raise SystemExit(f"loop-lag: session {seed}: {client.status()}")


def report(figures: dict[str, list[float]], seconds: float) -> None:
    print(f"all sessions in {seconds:.1f} s, load {os.getloadavg()[0]:.1f}")
    for title, name in (("lag", "lag"), ("the loop's own lag", "own"), ("a turn's processor time", "turns")):
        cells = [f"p{share * 100:g} {percentile(figures[name], share) * 1e3:.2f}" for share in (0.5, 0.9, 0.99, 0.999)]
        print(f"{title}, ms: {'  '.join(cells)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
