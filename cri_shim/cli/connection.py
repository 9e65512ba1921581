"""How a command finds its daemon: by the socket that is named, else by the configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from cri_shim.rpc.admin_client import AdminClient

Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001  it has no public name


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option that names a configuration."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="default: /etc/cri-shim/config.yaml if it exists")


def add_connection(parser: argparse.ArgumentParser) -> None:
    """The options that name a daemon."""
    add_config(parser)
    parser.add_argument(
        "--listen", metavar="SOCK", type=Path, help="the daemon's socket, instead of the configuration's"
    )


def connect(arguments: argparse.Namespace) -> AdminClient:
    """Raises InvalidArgument for a bad configuration, Unavailable when nobody listens."""
    from cri_shim import config  # noqa: PLC0415  each command loads only what it needs
    from cri_shim.rpc.admin_client import AdminClient  # noqa: PLC0415

    return AdminClient(arguments.listen or Path(config.load(arguments.config)[0].listen))
