"""Measures how long the calls of a pod's life take, and what memory the pods cost, on any CRI daemon.

With `--vs` a second daemon is measured in turn with the first, round by round, so that both meet the same machine.
Nothing is asserted here: it prints what it saw, with the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import grpc

from cri_shim.pb import api_pb2 as pb
from scripts.bench.report import as_table, summarise
from scripts.bench.target import Round, Target, Work, run_round
from tests.support.cri import Cri, fault

NETWORKS = {"bridge": pb.POD, "host": pb.NODE}


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    try:
        targets = [_target(options, prefix) for prefix in ("", "vs_") if not prefix or options.vs]
    except grpc.RpcError as error:
        return _report(options.endpoint, error)
    work = Work(iterations=options.iterations, pods=options.pods, pull=options.pull)
    rounds: dict[str, list[Round]] = {target.name: [] for target in targets}
    for number in range(options.rounds):
        for target in targets:
            print(f"round {number + 1} of {options.rounds}: {target.name}", file=sys.stderr)
            try:
                rounds[target.name].append(run_round(target, work))
            except grpc.RpcError as error:
                return _report(target.name, error)
    figures = [summarise(name, of_one) for name, of_one in rounds.items()]
    print(json.dumps([asdict(f) for f in figures], indent=2) if options.json else as_table(figures))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lifecycle", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--endpoint", required=True, type=_socket, metavar="SOCKET", help="the daemon's CRI socket")
    add("--handler", default="", metavar="NAME", help="runtime handler (the daemon's default)")
    add("--image", required=True, help="the image to run; pulled if it is not there")
    add("--command", default="sleep 3600", help="its command; empty = the image's own (%(default)s)")
    add("--network", choices=list(NETWORKS), default="bridge", help="the pod's network (%(default)s: a namespace, CNI)")
    add("--pid", type=int, default=0, help="the daemon's process, to measure its memory")
    add("--vs", type=_socket, metavar="SOCKET", help="a second daemon to compare with")
    add("--vs-handler", default="", metavar="NAME")
    add("--vs-image", default="", help="(the same image)")
    add("--vs-command", help="(the same command)")
    add("--vs-pid", type=int, default=0)
    add("--pods", type=int, default=0, metavar="N", help="measure memory with N pods (not measured)")
    add("--pull", default="", metavar="IMAGE", help="measure PullImage of this image (not measured)")
    add("--iterations", type=int, default=20, help="pods per round (%(default)s)")
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--json", action="store_true", help="print the figures as JSON")
    return parser


def _target(options: argparse.Namespace, prefix: str) -> Target:
    def option(name: str) -> object:
        return getattr(options, prefix + name)

    socket = options.vs if prefix else options.endpoint
    handler = str(option("handler"))
    command = option("command")
    with Cri(socket) as cri:
        runtime = cri.runtime.Version(pb.VersionRequest(), timeout=10).runtime_name
    return Target(
        name=f"{'vs ' if prefix else ''}{runtime}{' ' + handler if handler else ''}",
        socket=socket,
        handler=handler,
        image=str(option("image") or options.image),
        command=tuple(shlex.split(str(options.command if command is None else command))),
        network=NETWORKS[options.network],
        pid=int(str(option("pid"))),
    )


def _report(what: object, error: grpc.RpcError) -> int:
    code, words = fault(error)
    print(f"lifecycle: {what}: {code.name}: {words}", file=sys.stderr)
    return 1


def _socket(text: str) -> Path:
    path = Path(text.removeprefix("unix://")).absolute()
    if not path.is_socket():
        raise argparse.ArgumentTypeError(f"{path} is no socket")
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
