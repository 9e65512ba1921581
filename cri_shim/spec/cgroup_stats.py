"""What the accounting files of a cgroup say, on v1 and on v2, as values; and the arithmetic that CRI wants of them.

No I/O: `cri_shim.adapters.stats` reads the files. Invariant: a file that is missing, or does not have the form that the
kernel documents, costs the figures that need it and nothing else; every number fits into CRI's unsigned 64 bits.

Sources: kernel documentation, admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1/{memory,cpuacct}.rst,
accounting/psi.rst.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

V1_FILES: Final[Mapping[str, tuple[str, ...]]] = {
    "cpuacct": ("cpuacct.usage",),
    "memory": (
        "memory.usage_in_bytes",
        "memory.limit_in_bytes",
        "memory.stat",
        "memory.memsw.usage_in_bytes",
        "memory.memsw.limit_in_bytes",
    ),
}
"""The files that `parse_v1` wants, by the controller that has them."""

V2_FILES: Final = (
    "cpu.stat",
    "cpu.pressure",
    "memory.current",
    "memory.max",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "memory.pressure",
    "io.pressure",
)
"""The files that `parse_v2` wants."""

_MAX: Final = (1 << 64) - 1
_UNLIMITED: Final = 1 << 62
"""v1 writes no limit as the largest page-aligned 63-bit number."""
_NO_LIMIT: Final = "max"
_NUMBER: Final = re.compile(r"[0-9]{1,20}")
_ENTRY: Final = re.compile(
    r"^(usage_usec|anon|inactive_file|pgfault|pgmajfault|total_rss|total_inactive_file|total_pgfault|total_pgmajfault)"
    r" ([0-9]{1,20})$",
    re.MULTILINE,
)
_PRESSURE: Final = re.compile(
    r"^(some|full) avg10=([0-9]{1,3}\.[0-9]{2}) avg60=([0-9]{1,3}\.[0-9]{2}) avg300=([0-9]{1,3}\.[0-9]{2})"
    r" total=([0-9]{1,20})$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Waited:
    """One line of a pressure file: shares in percent over 10, 60 and 300 s, and the total in ns."""

    avg10: float
    avg60: float
    avg300: float
    total_ns: int


@dataclass(frozen=True, slots=True)
class Pressure:
    """Time lost in waiting for a resource: by at least one task, and by all of them."""

    some: Waited
    full: Waited | None


@dataclass(frozen=True, slots=True)
class Cpu:
    """`usage_ns` sums all CPUs since the cgroup was made."""

    usage_ns: int
    pressure: Pressure | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """In bytes. `available` is 0 where there is no limit; faults are None where nobody counts them."""

    usage: int
    working_set: int
    available: int
    rss: int
    page_faults: int | None = None
    major_page_faults: int | None = None
    pressure: Pressure | None = None


@dataclass(frozen=True, slots=True)
class Swap:
    """In bytes. `available` is None where there is no limit."""

    usage: int
    available: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a cgroup uses; None for what the host does not account."""

    cpu: Cpu | None = None
    memory: Memory | None = None
    swap: Swap | None = None
    io: Pressure | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """A `Usage` at a time, in Unix ns. `nano_cores`: CPU ns per second at present, None while nobody can know."""

    at: int
    usage: Usage
    nano_cores: int | None = None


NOTHING: Final = Usage(Cpu(0), Memory(usage=0, working_set=0, available=0, rss=0))
"""Of a group of processes that there is not (yet)."""


def parse_v1(files: Mapping[str, str]) -> Usage:
    """`files`: what there is of `V1_FILES`. v1 knows no pressure."""
    usage = _number(files.get("cpuacct.usage"))
    return Usage(
        cpu=None if usage is None else Cpu(usage),
        memory=_memory_v1(files),
        swap=_swap_v1(files),
    )


def parse_v2(files: Mapping[str, str]) -> Usage:
    """`files`: what there is of `V2_FILES`."""
    usec = _table(files.get("cpu.stat")).get("usage_usec")
    return Usage(
        cpu=None if usec is None else Cpu(_fitting(usec * 1000), parse_pressure(files.get("cpu.pressure"))),
        memory=_memory_v2(files),
        swap=_swap_v2(files),
        io=parse_pressure(files.get("io.pressure")),
    )


def guest_usage(cpu_ns: int, memory: int, resident: int, limit: int) -> Usage:
    """Of a guest in the daemon's own process: what is resident of its memory is anonymous, and cannot be dropped."""
    available = max(0, limit - resident)
    return Usage(Cpu(cpu_ns), Memory(usage=memory, working_set=resident, available=available, rss=resident))


def combined(base: Usage, others: Iterable[Usage]) -> Usage:
    """`base` with what is not counted in it. A limit, and with it what is available, is that of `base`."""
    total = base
    for other in others:
        total = replace(total, cpu=_more_cpu(total.cpu, other.cpu), memory=_more_memory(total.memory, other.memory))
    return total


def parse_pressure(text: str | None) -> Pressure | None:
    """A pressure file; None when it is none. `full` of the CPU is missing before Linux 5.13."""
    lines = {
        kind: Waited(float(avg10), float(avg60), float(avg300), _fitting(int(total) * 1000))
        for kind, avg10, avg60, avg300, total in _PRESSURE.findall(text or "")
    }
    return Pressure(lines["some"], lines.get("full")) if "some" in lines else None


def _memory_v1(files: Mapping[str, str]) -> Memory | None:
    usage, table = _number(files.get("memory.usage_in_bytes")), _table(files.get("memory.stat"))
    if usage is None or "total_rss" not in table:
        return None
    return _memory(
        usage,
        inactive=table.get("total_inactive_file", 0),
        limit=_limit(files.get("memory.limit_in_bytes")),
        rss=table["total_rss"],
        faults=(table.get("total_pgfault"), table.get("total_pgmajfault")),
    )


def _memory_v2(files: Mapping[str, str]) -> Memory | None:
    usage, table = _number(files.get("memory.current")), _table(files.get("memory.stat"))
    if usage is None or "anon" not in table:
        return None
    memory = _memory(
        usage,
        inactive=table.get("inactive_file", 0),
        limit=_limit(files.get("memory.max")),
        rss=table["anon"],
        faults=(table.get("pgfault"), table.get("pgmajfault")),
    )
    return replace(memory, pressure=parse_pressure(files.get("memory.pressure")))


def _memory(usage: int, *, inactive: int, limit: int | None, rss: int, faults: tuple[int | None, int | None]) -> Memory:
    working_set = max(0, usage - inactive)
    available = 0 if limit is None else max(0, limit - working_set)
    return Memory(usage, working_set, available, rss, *faults)


def _swap_v1(files: Mapping[str, str]) -> Swap | None:
    """The memsw files count memory and swap together."""
    memory, both = _number(files.get("memory.usage_in_bytes")), _number(files.get("memory.memsw.usage_in_bytes"))
    if memory is None or both is None:
        return None
    usage = max(0, both - memory)
    limit, limit_of_both = _limit(files.get("memory.limit_in_bytes")), _limit(files.get("memory.memsw.limit_in_bytes"))
    if limit is None or limit_of_both is None:
        return Swap(usage, None)
    return Swap(usage, max(0, limit_of_both - limit - usage))


def _swap_v2(files: Mapping[str, str]) -> Swap | None:
    usage, limit = _number(files.get("memory.swap.current")), _limit(files.get("memory.swap.max"))
    if usage is None:
        return None
    return Swap(usage, None if limit is None else max(0, limit - usage))


def _more_cpu(one: Cpu | None, other: Cpu | None) -> Cpu | None:
    if one is None or other is None:
        return one or other
    return replace(one, usage_ns=_fitting(one.usage_ns + other.usage_ns))


def _more_memory(one: Memory | None, other: Memory | None) -> Memory | None:
    if one is None or other is None:
        return one or other
    return replace(
        one,
        usage=_fitting(one.usage + other.usage),
        working_set=_fitting(one.working_set + other.working_set),
        rss=_fitting(one.rss + other.rss),
        page_faults=_more(one.page_faults, other.page_faults),
        major_page_faults=_more(one.major_page_faults, other.major_page_faults),
    )


def _more(one: int | None, other: int | None) -> int | None:
    return None if one is None and other is None else _fitting((one or 0) + (other or 0))


def _number(text: str | None) -> int | None:
    found = _NUMBER.fullmatch((text or "").strip())
    return _fitting(int(found[0])) if found else None


def _limit(text: str | None) -> int | None:
    """None for no limit."""
    number = None if text is None or text.strip() == _NO_LIMIT else _number(text)
    return None if number is None or number > _UNLIMITED else number


def _table(text: str | None) -> dict[str, int]:
    """Lines of a name and a number, as far as their names matter here."""
    return {name: _fitting(int(value)) for name, value in _ENTRY.findall(text or "")}


def _fitting(number: int) -> int:
    return min(number, _MAX)
