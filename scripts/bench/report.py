"""From rounds to figures: the median of the rounds, and ratios between two daemons. No measuring, only arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scripts.bench.target import Round

BLANK = "-"


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds."""

    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one daemon: of each quantity the median of all rounds."""

    name: str
    loads: tuple[float, ...]
    latency: dict[str, Latency]
    memory: dict[str, float]
    """MiB of PSS."""


def summarise(name: str, rounds: Sequence[Round]) -> Figures:
    calls = _keys(r.latency for r in rounds)
    kinds = _keys(r.memory for r in rounds)
    return Figures(
        name=name,
        loads=tuple(round(r.load, 2) for r in rounds),
        latency={
            call: Latency(
                p50=statistics.median(percentile(r.latency[call], 50) for r in rounds if call in r.latency),
                p95=statistics.median(percentile(r.latency[call], 95) for r in rounds if call in r.latency),
            )
            for call in calls
        },
        memory={kind: statistics.median(r.memory[kind] for r in rounds if kind in r.memory) for kind in kinds},
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def as_table(figures: Sequence[Figures]) -> str:
    """One line per quantity; with two daemons the last column is the first one's figure over the second one's."""
    lines = [f"load average at the start of each round: {_loads(figures)}", ""]
    head = "".join(f"{f.name[:17]:>18}{'p95':>9}" for f in figures)
    lines.append(f"{'ms (p50)':24}{head}{'ratio' if len(figures) > 1 else '':>8}")
    for call in _keys(f.latency for f in figures):
        found = [f.latency.get(call) for f in figures]
        cells = "".join(f"{x.p50:18.2f}{x.p95:9.2f}" if x else f"{BLANK:>18}{BLANK:>9}" for x in found)
        lines.append(f"{call:24}{cells}{_ratio([x.p50 if x else None for x in found]):>8}")
    if any(f.memory for f in figures):
        lines += ["", f"{'MiB (PSS)':24}" + "".join(f"{f.name[:17]:>18}{'':9}" for f in figures)]
        for kind in _keys(f.memory for f in figures):
            values = [f.memory.get(kind) for f in figures]
            cells = "".join(f"{x:18.2f}{'':9}" if x is not None else f"{BLANK:>18}{'':9}" for x in values)
            lines.append(f"{kind:24}{cells}{_ratio(values):>8}")
    return "\n".join(line.rstrip() for line in lines)


def _loads(figures: Sequence[Figures]) -> str:
    return "; ".join(f"{f.name}: {', '.join(map(str, f.loads))}" for f in figures)


def _ratio(values: Sequence[float | None]) -> str:
    match values:
        case [float(ours), float(theirs)] if theirs:
            return f"{ours / theirs:.2f}"
        case [_]:
            return ""
        case _:
            return BLANK


def _keys(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    """The keys of all mappings in the order of their first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
