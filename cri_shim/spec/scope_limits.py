"""Limits as properties of a systemd scope, for processes that no OCI runtime runs, on cgroup v2.

systemd writes the files of a scope again when it likes, from the properties that it knows: what it is not told does not
last. What has no property (huge pages, rare files) is in the files alone (`cri_shim.spec.cgroup_limits`), and systemd
leaves those. Sources: systemd.resource-control(5), org.freedesktop.systemd1(5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from cri_shim.spec.cgroup_limits import Setting

Value = int | bytes

_MAX: Final = (1 << 64) - 1
"""`infinity`."""
_SECOND: Final = 1_000_000
_NUMBERS: Final = {
    "memory.max": "MemoryMax",
    "memory.high": "MemoryHigh",
    "memory.low": "MemoryLow",
    "memory.min": "MemoryMin",
    "memory.swap.max": "MemorySwapMax",
    "cpu.weight": "CPUWeight",
    "pids.max": "TasksMax",
}
_SETS: Final = {"cpuset.cpus": "AllowedCPUs", "cpuset.mems": "AllowedMemoryNodes"}


def scope_limits(settings: Iterable[Setting]) -> dict[str, Value]:
    """What systemd has to know of the settings of v2. A value that is none of its kind is the kernel's affair."""
    found: dict[str, Value] = {}
    for setting in settings:
        try:
            found |= _properties(setting)
        except ValueError:
            continue
    return found


def _properties(setting: Setting) -> Mapping[str, Value]:
    if name := _NUMBERS.get(setting.file):
        return {name: _number(setting.value)}
    if name := _SETS.get(setting.file):
        return {name: mask(setting.value)}
    if setting.file == "cpu.max":
        quota, period = setting.value.split()
        per_second = _MAX if quota == "max" else int(quota) * _SECOND // int(period)
        return {"CPUQuotaPerSecUSec": per_second, "CPUQuotaPeriodUSec": int(period)}
    return {}


def _number(text: str) -> int:
    return _MAX if text == "max" else int(text)


def mask(ranges: str) -> bytes:
    """A list such as `0-2,7` as a bit mask, the lowest bit first. ValueError when it is none."""
    bits = 0
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < 1 << 16:
            raise ValueError(part)
        bits |= (1 << high + 1) - (1 << low)
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")
