"""Wasm containers in both placements, beside busybox containers of Debian's containerd with runc.

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
from scripts.bench.bed import bed
from scripts.bench.first_line import milliseconds
from scripts.bench.report import percentile
from scripts.bench.running import Kind, growth_per_container
from tests.support import go_guests, images, wasm

T = TypeVar("T")

PLACEMENTS = {"in process": "wasm", "isolated": "isolated"}
HANDLERS = {"wasm": {"kind": "wasmtime"}, "isolated": {"kind": "wasmtime", "isolation": "process"}}
WAITS = ("sh", "-c", "echo hello; exec sleep 3600")
ENDS = ("echo", "hello")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="wasm", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--iterations", type=int, default=30, help="starts per round (%(default)s)")
    add("--containers", type=int, default=50, help="that run while memory is measured (%(default)s)")
    add("--seconds", type=float, default=10, help="of lifecycles per round (%(default)s)")
    add("--clients", type=int, default=8, help="that make lifecycles at once (%(default)s)")
    add("--crowd", type=int, default=1000, help="modules that run at once in the end (%(default)s)")
    add("--only", choices=list(SECTIONS), action="append", help="measure this only; may be repeated")
    options = parser.parse_args(argv)
    with bed("wasm", handlers=HANDLERS) as ground:
        for state in (ground.daemon.state, ground.peer_base / "state"):
            ground.clean_up.enter_context(in_memory(state))
        ground.daemon.start()
        ours = (ground.daemon.socket, ground.daemon.pid)
        subjects = _subjects(ground.base, ground.registry, ours, ground.peer())
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


def _subjects(base: Path, registry: images.Registry, daemon: tuple[Path, int], peer: tuple[Path, int]) -> Subjects:
    """`daemon` and `peer` are socket and pid."""
    guests = {"small": registry.push_wasm("bench/sleep:1", wasm.SLEEP)}
    if go_guests.program() is not None:
        module = go_guests.build("hello", base)
        guests[f"Go ({len(module) / 1e6:.1f} MB)"] = registry.push("bench/go:1", images.wasm_artifact(module))
    else:
        print("wasm: without Go only the small module is measured", file=sys.stderr)
    ends = registry.push_wasm("bench/hello:1", wasm.HELLO)
    busybox = registry.push_busybox("bench/busybox:1")

    def of_ours(placement: str, guest: str, image: str) -> Kind:
        return Kind(f"{placement}, {guest}", *daemon, PLACEMENTS[placement], image, (), base / "pods")

    def of_peer(command: tuple[str, ...]) -> Kind:
        return Kind("containerd, runc", *peer, "runc", busybox, command, base / "pods")

    return Subjects(
        [*(of_ours(p, guest, image) for p in PLACEMENTS for guest, image in guests.items()), of_peer(WAITS)],
        [*(of_ours(p, "small", ends) for p in PLACEMENTS), of_peer(ENDS)],
    )


def first_line(subjects: Subjects, options: argparse.Namespace) -> None:
    print("== StartContainer to the first line in the log, ms: p50, p95, least", flush=True)
    rounds = _rounds(subjects.waiting, options.rounds, lambda kind: milliseconds(kind, options.iterations))
    medians = {t: statistics.median(percentile(v, 50) for v in found) for t, found in rounds.items()}
    for title, found in rounds.items():
        p95 = statistics.median(percentile(values, 95) for values in found)
        print(_row(title, medians, f"{medians[title]:10.2f}{p95:10.2f}{min(map(min, found)):10.2f}"))
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


def _rounds(kinds: Sequence[Kind], rounds: int, measure: Callable[[Kind], T]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {kind.title: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds:
            print(f"round {number + 1}: {kind.title}, load {os.getloadavg()[0]:.2f}", file=sys.stderr, flush=True)
            found[kind.title].append(measure(kind))
    return found


def _figures(rounds: Mapping[str, Sequence[float]]) -> None:
    medians = {title: statistics.median(found) for title, found in rounds.items()}
    for title, value in medians.items():
        print(_row(title, medians, f"{value:10.1f}"))
    print(flush=True)


def _row(title: str, medians: Mapping[str, float], cells: str) -> str:
    """With the ratio to the last one's median, the peer's."""
    peer = list(medians)[-1]
    return f"{title:26}{cells}" + (f"{medians[title] / medians[peer]:10.3f}" if title != peer else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
