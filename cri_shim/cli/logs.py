"""`cri-shim logs`: what a container writes, to the same streams. No logic of its own."""

from __future__ import annotations

import argparse
import sys

from cri_shim.cli.connection import Parsers, add_connection, connect


def add_command(parsers: Parsers) -> None:
    """`logs`."""
    words = "print what a container has written, as crictl logs does"
    parser = parsers.add_parser("logs", help=words, description=words)
    add_connection(parser)
    parser.add_argument("container", metavar="CONTAINER", help="its id, or the beginning of it")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on, through rotations and restarts, until the pod ends"
    )
    parser.add_argument("--tail", metavar="N", type=int, help="only the last N entries")
    parser.add_argument("--since", metavar="T", default="", help="a time (2026-01-31T12:00:00Z) or how long ago (90s)")
    parser.add_argument("--timestamps", action="store_true", help="put the time in front of each line")
    parser.set_defaults(run=_logs)


def _logs(arguments: argparse.Namespace) -> int:
    from cri_shim.pb.admin_pb2 import ReadLogRequest  # noqa: PLC0415  each command loads only what it needs

    request = ReadLogRequest(
        container_id=arguments.container,
        follow=arguments.follow,
        tail=arguments.tail,
        since=arguments.since,
        timestamps=arguments.timestamps,
    )
    with connect(arguments) as daemon:
        for chunk in daemon.read_log(request):
            stream = sys.stderr if chunk.stderr else sys.stdout
            stream.buffer.write(chunk.data)
            stream.buffer.flush()
    return 0
