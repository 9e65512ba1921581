"""Facts about the node and the daemon's own rights, read once at start."""

from __future__ import annotations

from dataclasses import dataclass

from cri_shim.model.selinux import Contexts


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the host is. Nothing here changes while the daemon runs."""

    hostname: str
    boot_id: str
    root: bool
    """The daemon may mount, unshare and chroot; without, it runs Wasm artifacts in the host's network only."""
    selinux: bool = False
    selinux_contexts: Contexts | None = None
    """None: SELinux is off, or its policy has none for containers; nothing is labelled then."""
    apparmor: bool = False
    seccomp: bool = True
