"""The command line: the daemon, and what is asked of one that runs. No logic of its own.

argparse, not a library: the daemon's start time and memory are features, and these few verbs need no more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import cri_shim
from cri_shim.cli import explain, images, logs, node
from cri_shim.cli.connection import add_config
from cri_shim.model.errors import CriShimError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for a failure that has been explained, 2 for a wrong call."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except CriShimError as error:
        print(f"cri-shim: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"cri-shim: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cri-shim", description=cri_shim.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the daemon")
    add_config(serve)
    serve.add_argument("--listen", metavar="SOCK", help="unix socket, instead of the configuration's")
    serve.set_defaults(run=_serve)

    config = commands.add_parser("config", help="check or print the configuration")
    verbs = config.add_subparsers(required=True, metavar="VERB")
    check = verbs.add_parser("check", help="exit 0 when the configuration is valid, else say what is wrong")
    add_config(check)
    check.set_defaults(run=_config_check)
    dump = verbs.add_parser("dump", help="print the merged configuration with the origin of each value")
    add_config(dump)
    dump.set_defaults(run=_config_dump)

    images.add_commands(commands)
    logs.add_command(commands)
    explain.add_command(commands)
    node.add_commands(commands)

    return parser


def _serve(arguments: argparse.Namespace) -> int:
    from cri_shim import app  # noqa: PLC0415 (gRPC and the rest are for the daemon only)

    return app.serve(arguments.config, arguments.listen)


def _config_check(arguments: argparse.Namespace) -> int:
    from cri_shim import app  # noqa: PLC0415 (as above)

    app.check(arguments.config)
    print("the configuration is valid")
    return 0


def _config_dump(arguments: argparse.Namespace) -> int:
    from cri_shim import config  # noqa: PLC0415 (as above)

    print(config.dump(*config.load(arguments.config)), end="")
    return 0
