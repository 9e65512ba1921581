"""`cri-shim explain`: which handler would run a container of an image, and why. No logic of its own."""

from __future__ import annotations

import argparse
import shlex

from cri_shim.cli.connection import Parsers, add_connection, connect
from cri_shim.model.errors import InvalidArgument


def add_command(parsers: Parsers) -> None:
    """`explain`."""
    words = "say which handler would run a container of an image, and why; 1 when none would"
    parser = parsers.add_parser("explain", help=words, description=words)
    add_connection(parser)
    parser.add_argument("image", metavar="IMAGE", help="an image of this node")
    parser.add_argument("command", metavar="COMMAND", nargs="*", help="the container's command; default: the image's")
    parser.add_argument("--runtime-handler", metavar="NAME", default="", help="of the pod's RuntimeClass")
    parser.add_argument("--annotation", metavar="KEY=VALUE", action="append", default=[], help="of the pod")
    parser.add_argument("--container", metavar="NAME", default="main", help="its name, for annotations that name it")
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    from cri_shim.pb.admin_pb2 import ExplainImageRequest  # noqa: PLC0415  each command loads only what it needs

    request = ExplainImageRequest(
        image=arguments.image,
        runtime_handler=arguments.runtime_handler,
        annotations=dict(map(_pair, arguments.annotation)),
        command=arguments.command,
        container=arguments.container,
    )
    with connect(arguments) as daemon:
        answer = daemon.explain_image(request)
    print(f"image       {answer.image_id}")
    print(f"platform    {answer.platform}{', a Wasm artifact' if answer.artifact else ''}")
    print(f"command     {shlex.join(answer.command)}")
    if not answer.artifact and answer.entrypoint:
        print(f"entrypoint  {answer.entrypoint}")
    print(f"pod         handler {answer.pod_handler}")
    if answer.refusal:
        print(f"container   refused: {answer.refusal}")
        return 1
    print(f"container   handler {answer.handler}: {answer.reason}")
    return 0


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        msg = f"--annotation {text!r} is not of the form KEY=VALUE"
        raise InvalidArgument(msg)
    return key, value
