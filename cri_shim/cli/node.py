"""`cri-shim doctor` and `cri-shim version`: about the node, and about who answers on it. No logic of its own."""

from __future__ import annotations

import argparse

import cri_shim
from cri_shim.cli.connection import Parsers, add_connection, connect
from cri_shim.model.errors import CriShimError


def add_commands(parsers: Parsers) -> None:
    """`doctor` and `version`."""
    words = "say what this node has, what it lacks and how to get it; 1 when something is lacking"
    doctor = parsers.add_parser("doctor", help=words, description=words)
    add_connection(doctor)
    doctor.add_argument("--conflist", action="store_true", help="print a CNI configuration for a bridge of this node")
    doctor.set_defaults(run=_doctor)

    version = parsers.add_parser("version", help="print the version of this command and of the daemon that answers")
    add_connection(version)
    version.set_defaults(run=_version)


def _doctor(arguments: argparse.Namespace) -> int:
    from cri_shim import doctor  # noqa: PLC0415  each command loads only what it needs
    from cri_shim.spec.node_report import Level, default_conflist, findings  # noqa: PLC0415

    if arguments.conflist:
        print(default_conflist())
        return 0
    found = list(findings(doctor.look(arguments.config, arguments.listen)))
    for finding in found:
        print(f"{finding.level.value:<5}  {finding.text}")
        if finding.hint:
            print(f"       → {finding.hint}")
    return 1 if any(finding.level is Level.LACKS for finding in found) else 0


def _version(arguments: argparse.Namespace) -> int:
    print(f"{cri_shim.RUNTIME_NAME} {cri_shim.VERSION}")
    try:
        with connect(arguments) as daemon:
            print(f"daemon {daemon.version()}")
    except CriShimError as error:
        print(f"daemon: {error}")
    return 0
