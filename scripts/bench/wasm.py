"""Wasm containers in both placements, beside containers of Debian's containerd: busybox by runc, or the same modules
by crun in its own engine, WasmEdge (`--peer crun`).

The same client makes the same calls to both daemons in turn, round by round. Start to first line: from the call of
StartContainer to the time that the first line bears in the CRI log. Memory: what daemon, helpers and containers grow by
for each of many pods whose container has printed a line and sleeps. Lifecycles: pods on the host's network, from
RunPodSandbox to RemovePodSandbox, whose container prints a line and ends. At last a crowd of modules in one daemon, and
how it answers meanwhile. As root, inside `scripts/private-ns` (`scripts/bench/wasm` does that).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from scripts.bench import churn, crowd
from scripts.bench.bed import Bed, bed
from scripts.bench.first_line import milliseconds
from scripts.bench.report import percentile
from scripts.bench.running import Kind, growth_per_container
from tests.support import go_guests, images, wasm

T = TypeVar("T")

PLACEMENTS = {"in process": "wasm", "isolated": "isolated"}
HANDLERS = {"wasm": {"kind": "wasmtime"}, "isolated": {"kind": "wasmtime", "isolation": "process"}}
WAITS = ("sh", "-c", "echo hello; exec sleep 3600")
ENDS = ("echo", "hello")
MODULE = "/main.wasm"
UNIFIED = Path("/sys/fs/cgroup/unified")
MODULE_BY_CRUN = (("module.wasm.image/variant", "compat"),)
"""The annotation that lets crun run an image's entrypoint in its engine."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="wasm", description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--peer", choices=("runc", "crun"), default="runc", help="what containerd runs (%(default)s)")
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--iterations", type=int, default=30, help="starts per round (%(default)s)")
    add("--containers", type=int, default=50, help="that run while memory is measured (%(default)s)")
    add("--seconds", type=float, default=10, help="of lifecycles per round (%(default)s)")
    add("--clients", type=int, default=8, help="that make lifecycles at once (%(default)s)")
    add("--crowd", type=int, default=1000, help="modules that run at once in the end (%(default)s)")
    add("--only", choices=list(SECTIONS), action="append", help="measure this only; may be repeated")
    options = parser.parse_args(argv)
    if options.peer == "crun" and UNIFIED.is_mount():
        # crun refuses to run where controllers are in both versions; the mount namespace is ours.
        subprocess.run(["umount", UNIFIED], check=True)
    with bed("wasm", handlers=HANDLERS) as ground:
        for state in (ground.daemon.state, ground.peer_base / "state"):
            ground.clean_up.enter_context(in_memory(state))
        ground.daemon.start()
        subjects = Node(ground, ground.peer(), options.peer).subjects()
        for name, section in SECTIONS.items():
            if not options.only or name in options.only:
                section(subjects, options)
    return 0


@contextmanager
def in_memory(directory: Path) -> Iterator[None]:
    """What is below /run on a node is on a tmpfs; ext4 is slow to make files for a minute where it has removed many."""
    directory.mkdir(mode=0o711, parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=711", "bench", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", directory], check=False)


@dataclass(frozen=True, slots=True)
class Subjects:
    """Containers that print a line and wait, and such as print a line and end; the peer's are the last ones."""

    waiting: Sequence[Kind]
    ending: Sequence[Kind]


@dataclass(frozen=True, slots=True)
class Guest:
    """A module, and how it is called; no words = as it is."""

    module: bytes
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """Both daemons on one registry."""

    ground: Bed
    peer: tuple[Path, int]
    """Socket and pid."""
    peer_handler: str

    def subjects(self) -> Subjects:
        waits, ends = {"small": Guest(wasm.assemble(wasm.SLEEP))}, {"small": Guest(wasm.assemble(wasm.HELLO))}
        module = go_guests.find("hello", self.ground.base)
        if module is None:
            print("wasm: without Go only the small module is measured", file=sys.stderr)
        else:
            name = f"Go ({len(module) / 1e6:.1f} MB)"
            waits[name], ends[name] = Guest(module), Guest(module, (MODULE, "once"))
        return Subjects(self._kinds(waits, WAITS), self._kinds(ends, ENDS))

    def _kinds(self, guests: Mapping[str, Guest], command: tuple[str, ...]) -> list[Kind]:
        """`command` is what busybox runs beside them."""
        if self.peer_handler == "runc":
            busybox = self._peer("containerd, runc", self.ground.registry.push_busybox("bench/busybox:1"), command)
            peers = dict.fromkeys(guests, busybox)
        else:
            # crun knows no artifacts.
            peers = {
                name: self._peer(f"containerd, crun, {name}", self._as_file(guest), guest.command, MODULE_BY_CRUN)
                for name, guest in guests.items()
            }
        ours = [self._ours(p, name, guest, peers[name]) for p in PLACEMENTS for name, guest in guests.items()]
        return [*ours, *dict.fromkeys(peers.values())]

    def _ours(self, placement: str, name: str, guest: Guest, peer: Kind) -> Kind:
        daemon, handler, title = self.ground.daemon, PLACEMENTS[placement], f"{placement}, {name}"
        image = self._as_file(guest) if guest.command else self._as_artifact(guest)
        return Kind(title, daemon.socket, daemon.pid, handler, image, guest.command, daemon.pod_logs, peer=peer)

    def _peer(
        self, title: str, image: str, command: tuple[str, ...], annotations: tuple[tuple[str, str], ...] = ()
    ) -> Kind:
        return Kind(title, *self.peer, self.peer_handler, image, command, self.ground.daemon.pod_logs, annotations)

    def _as_artifact(self, guest: Guest) -> str:
        return self._push("artifact", guest, images.wasm_artifact(guest.module))

    def _as_file(self, guest: Guest) -> str:
        layer = images.layer([images.file(MODULE.lstrip("/"), guest.module, 0o755)])
        return self._push("file", guest, images.image([layer], {"Entrypoint": [MODULE]}))

    def _push(self, form: str, guest: Guest, image: images.Image) -> str:
        return self.ground.registry.push(f"bench/{form}:{images.digest(guest.module)[-12:]}", image)


def first_line(subjects: Subjects, options: argparse.Namespace) -> None:
    print("== StartContainer to the first line in the log, ms: p50, p95, least", flush=True)
    rounds = _rounds(subjects.waiting, options.rounds, lambda kind: milliseconds(kind, options.iterations))
    medians = {kind: statistics.median(percentile(v, 50) for v in found) for kind, found in rounds.items()}
    for kind, found in rounds.items():
        p95 = statistics.median(percentile(values, 95) for values in found)
        print(_row(kind, medians, f"{medians[kind]:10.2f}{p95:10.2f}{min(map(min, found)):10.2f}"))
    print(flush=True)


def running_memory(subjects: Subjects, options: argparse.Namespace) -> None:
    print(f"== memory of a running container and its pod, KiB (PSS, {options.containers} of them)", flush=True)
    _figures(_rounds(subjects.waiting, options.rounds, lambda kind: growth_per_container(kind, options.containers)))


def lifecycles(subjects: Subjects, options: argparse.Namespace) -> None:
    print(f"== lifecycles a second, {options.clients} clients", flush=True)
    _figures(_rounds(subjects.ending, options.rounds, lambda kind: churn.rate(kind, options.clients, options.seconds)))


def many_at_once(subjects: Subjects, options: argparse.Namespace) -> None:
    print(f"== {options.crowd} modules at once in one daemon", flush=True)
    for number in range(options.rounds):
        print(f"round {number + 1}, load {os.getloadavg()[0]:.2f}:", end=" ", flush=True)
        print("\n".join(crowd.measure(subjects.waiting[0], options.crowd)), flush=True)


SECTIONS = {"first-line": first_line, "memory": running_memory, "lifecycles": lifecycles, "crowd": many_at_once}


def _rounds(kinds: Sequence[Kind], rounds: int, measure: Callable[[Kind], T]) -> dict[Kind, list[T]]:
    found: dict[Kind, list[T]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds:
            print(f"round {number + 1}: {kind.title}, load {os.getloadavg()[0]:.2f}", file=sys.stderr, flush=True)
            found[kind].append(measure(kind))
    return found


def _figures(rounds: Mapping[Kind, Sequence[float]]) -> None:
    medians = {kind: statistics.median(found) for kind, found in rounds.items()}
    for kind, value in medians.items():
        print(_row(kind, medians, f"{value:10.1f}"))
    print(flush=True)


def _row(kind: Kind, medians: Mapping[Kind, float], cells: str) -> str:
    """With the ratio to the peer's median."""
    ratio = f"{medians[kind] / medians[kind.peer]:10.3f}" if kind.peer is not None else ""
    return f"{kind.title:30}{cells}{ratio}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
