"""The daemon's own capabilities, from /proc/self/status. Not for changing any."""

from __future__ import annotations

from pathlib import Path

from cri_shim.model.capabilities import NAMES


def effective() -> frozenset[str]:
    """What this process may do now, as names without `CAP_`."""
    return _field("CapEff")


def bounding() -> frozenset[str]:
    """The most that any child of this process can get, as names without `CAP_`."""
    return _field("CapBnd")


def can_lower_oom_score_adj() -> bool:
    """Whether a score below the daemon's own can be given to a container (proc_pid_oom_score_adj(5))."""
    return "SYS_RESOURCE" in effective()


def _field(name: str) -> frozenset[str]:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    mask = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith(f"{name}:"))
    return frozenset(capability for bit, capability in enumerate(NAMES) if mask >> bit & 1)
