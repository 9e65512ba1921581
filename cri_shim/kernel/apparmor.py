"""AppArmor as the kernel shows it: whether it is on, the profiles that are loaded, and the one that we run under.

Not for loading any, which takes apparmor_parser(8). Blocks: for a thread. Invariant: a kernel without it has no
profiles and no label; that is no error.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

_ENABLED = Path("/sys/module/apparmor/parameters/enabled")
_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_LABEL = Path("/proc/thread-self/attr/current")


def is_enabled() -> bool:
    """Whether profiles are enforced, and can be managed from here: not in a container without securityfs."""
    return _text(_ENABLED).startswith("Y") and _PROFILES.exists()


def profiles() -> frozenset[str]:
    """Names of all loaded profiles, whatever their mode."""
    return parse_profiles(_text(_PROFILES))


def parse_profiles(table: str) -> frozenset[str]:
    """Each line is `NAME (MODE)`; a name may have spaces."""
    return frozenset(line.rpartition(" (")[0] for line in table.splitlines() if line.endswith(")"))


def own_label() -> str:
    """The profile of this process, empty when it has none."""
    label = _text(_LABEL).strip("\0\n") if is_enabled() else ""
    return "" if label == "unconfined" else label.rpartition(" (")[0] or label


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    return ""
