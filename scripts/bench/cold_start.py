"""Measures how long a daemon takes from exec to the first ListContainers that it serves, with pods on disk.

A private cri-shim makes the pods, host network and one container each, which run on while it is ended and started
again. As root it needs `scripts/private-ns` around it (`scripts/bench/cold-start` does that).
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc

from cri_shim.pb import api_pb2 as pb
from scripts.bench import memory
from tests.support.cri import container_config, fault
from tests.support.daemon import Daemon, DaemonError


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="cold-start", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--pods", type=int, default=50, metavar="N", help="pods on disk (%(default)s)")
    add("--image", default="", help="run a container of this image in each pod; it is pulled (none)")
    add("--command", default="sleep 3600", help="its command; empty = the image's own (%(default)s)")
    add("--handler", default="", metavar="NAME", help="runtime handler (the daemon's default)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="cs.") as directory:
        daemon = Daemon(Path(directory) / "0", cgroup_parent="/cri-shim-cold-start" if os.geteuid() == 0 else "")
        try:
            measure(daemon, options)
        except DaemonError as error:
            print(f"cold-start: {error}", file=sys.stderr)
            return 1
        except grpc.RpcError as error:
            print(f"cold-start: {': '.join(map(str, fault(error)))}", file=sys.stderr)
            return 1
        finally:
            daemon.close()
    return 0


def measure(daemon: Daemon, options: argparse.Namespace) -> None:
    """Prints the seconds of each start."""
    daemon.start()
    with daemon.client() as cri:
        if options.image:
            cri.pull(options.image)
        for _ in range(options.pods):
            pod = cri.run_pod(daemon.pod_config(network=pb.NODE), options.handler)
            if options.image:
                cri.run(pod, container_config(options.image, *shlex.split(options.command)))
    print(f"{options.pods} pods on disk; load average {os.getloadavg()[0]:.2f}")
    seconds = []
    for number in range(options.rounds):
        daemon.stop()
        seconds.append(daemon.start())
        print(f"start {number + 1}: {seconds[-1]:.3f} s")
    print(f"median:  {statistics.median(seconds):.3f} s")
    print(f"memory:  {memory.pss(memory.resident(daemon.pid, ())):.1f} MiB (PSS of the daemon and its children)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
