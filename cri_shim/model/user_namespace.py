"""The ids of a pod's user namespace: which users and groups of the host those inside are (user_namespaces(7)).

Not the namespace itself, which is pinned below the pod's directory. Invariant: id 0 inside is always mapped.
"""

from __future__ import annotations

from dataclasses import dataclass

UNMAPPED = 65534
"""What the kernel shows for an id that has no counterpart."""


@dataclass(frozen=True, slots=True)
class IdRange:
    """The ids 0 to `length` - 1 inside are those from `first` on at the host."""

    first: int
    length: int

    def holds(self, inside: int) -> bool:
        """Whether an id inside has a counterpart."""
        return 0 <= inside < self.length

    def on_host(self, inside: int) -> int:
        """The counterpart of an id inside."""
        return self.first + inside if self.holds(inside) else UNMAPPED


@dataclass(frozen=True, slots=True)
class UserNamespace:
    """Both of its ranges. The root user inside is `uids.first` and `gids.first` at the host."""

    uids: IdRange
    gids: IdRange
