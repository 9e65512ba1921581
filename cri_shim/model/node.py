"""Facts about the node and the daemon's own rights, read once at start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the host is. Nothing here changes while the daemon runs."""

    hostname: str
    boot_id: str
    root: bool
    """The daemon may mount, unshare and chroot; without, it runs Wasm artifacts in the host's network only."""
    selinux: bool = False
    apparmor: bool = False
    seccomp: bool = True
