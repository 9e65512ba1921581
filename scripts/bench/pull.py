"""Wall time and memory of pulls, a private cri-shim and Debian's containerd side by side on one registry.

Two images, made up but with the entropy of programs and libraries (they compress to two fifths): five layers that take
100 MB to transfer, and one layer of 10,000 small files. Each round pulls new ones of the same making with each daemon
in turn, and nothing is removed: ext4 is slow for a minute to make files where it has removed many. Memory is measured
in a pull of its own, so that the looking costs none of the time. As root, inside `scripts/private-ns`
(`scripts/bench/pull` does that).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from scripts.bench import memory
from scripts.bench.bed import bed
from tests.support import images
from tests.support.cri import Cri

MB = 1_000_000
LAYERS = 5
SMALL_FILES = 10_000
Layers = list[list[images.Entry]]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="pull", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--size", type=int, default=100, help="MB of the five layers together (%(default)s)")
    options = parser.parse_args(argv)
    with bed("pull") as ground:
        makers = {
            f"{options.size} MB, {LAYERS} layers": large_image(options.size * MB),
            f"{SMALL_FILES} small files": small_files_image(),
        }
        names = {
            title: [push(ground.registry, make, n) for n in range(options.rounds + 2)] for title, make in makers.items()
        }
        ground.daemon.start()
        daemons = {"cri-shim": (ground.daemon.socket, ground.daemon.pid), "containerd": ground.peer()}
        report(names, daemons, options.rounds)
    return 0


def push(registry: images.Registry, layers: Layers, number: int) -> str:
    """An image of its own for each number: no two have a layer in common."""
    salted = [images.layer([*entries, images.file("salt", b"%d" % number)]) for entries in layers]
    return registry.push(f"bench/{len(layers)}:{number}", images.image(salted, {"Cmd": ["/x"]}))


def report(names: Mapping[str, Sequence[str]], daemons: dict[str, tuple[Path, int]], rounds: int) -> None:
    """Prints one line per image."""
    with ExitStack() as closing:
        clients = {name: closing.enter_context(Cri(socket, timeout=600)) for name, (socket, _) in daemons.items()}
        print(f"load average {os.getloadavg()[0]:.2f}, {os.cpu_count()} CPUs, median of {rounds}", flush=True)
        for title, (first, second, *others) in names.items():
            grown = {name: growth(clients[name], daemons[name][1], first, second) for name in daemons}
            seconds: dict[str, list[float]] = {name: [] for name in daemons}
            for image in others:
                for name, cri in clients.items():
                    seconds[name].append(timed(cri, image))
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            ours, theirs = medians.values()
            each = "; ".join(f"{name} {medians[name]:.2f} s (+{grown[name]:.0f} MiB PSS)" for name in daemons)
            print(f"{title}: {each}; ratio {ours / theirs:.2f}", flush=True)


def timed(cri: Cri, image: str) -> float:
    """Seconds of a pull onto a node that has nothing of the image."""
    os.sync()  # what earlier rounds have written is not for this one to wait for
    begin = time.perf_counter()
    cri.pull(image)
    return time.perf_counter() - begin


def growth(cri: Cri, pid: int, first: str, image: str) -> float:
    """How far the daemon and its children grow in a pull, in MiB of PSS. The first pull loads what stays."""
    timed(cri, first)
    before = memory.pss(memory.Processes.now().tree([pid]))
    highest, done = before, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.02):
            highest = max(highest, memory.pss(memory.Processes.now().tree([pid])))

    watcher = threading.Thread(target=watch)
    watcher.start()
    timed(cri, image)
    done.set()
    watcher.join()
    return highest - before


def large_image(size: int) -> Layers:
    """Files of 1 KB to 2 MB in a few hundred directories."""
    dice = random.Random(1)
    layers = []
    for number in range(LAYERS):
        entries = [images.directory(f"opt/{number}")]
        left = size * 5 // 2 // LAYERS
        while left > 0:
            length = int(2 ** dice.uniform(10, 21))
            entries.append(images.file(f"opt/{number}/{len(entries)}.so", content(dice, length), 0o755))
            left -= length
        layers.append(entries)
    return layers


def small_files_image() -> Layers:
    """As of a language with many modules: 0.1 to 8 KB each."""
    dice = random.Random(2)
    paths = (f"lib/{number % 200}/{number}.py" for number in range(SMALL_FILES))
    files = [images.file(path, content(dice, dice.randint(100, 8000))) for path in paths]
    return [[*(images.directory(f"lib/{number}") for number in range(200)), *files]]


def content(dice: random.Random, length: int) -> bytes:
    """Runs of bytes that never come again between ones that do."""
    parts, total = [], 0
    while total < length:
        noise = dice.randbytes(dice.randint(8, 40))
        parts += [noise, COMMON[dice.randrange(64)]]
        total += len(noise) + len(parts[-1])
    return b"".join(parts)[:length]


COMMON = [random.Random(number).randbytes(16 + number) for number in range(64)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
