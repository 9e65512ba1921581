"""What a bench stands on: a directory, a registry and a daemon of ours below it, and where it is wanted the peer.

Not what is measured. Invariant: all of it is gone at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.containerd import containerd
from tests.support import images
from tests.support.daemon import Daemon


@dataclass(frozen=True, slots=True)
class Bed:
    """The daemon is not started yet. What else has to go at the end is given to `clean_up`."""

    base: Path
    registry: images.Registry
    daemon: Daemon
    clean_up: ExitStack

    @property
    def peer_base(self) -> Path:
        """Where the peer has its socket and its state."""
        return self.base / "peer"

    def peer(self) -> tuple[Path, int]:
        """Start Debian's containerd: its socket and its pid."""
        pid = self.clean_up.enter_context(containerd(self.peer_base, self.registry, self.daemon.cni))
        return self.peer_base / "containerd.sock", pid


@contextmanager
def bed(name: str, *, handlers: Mapping[str, object] | None = None, directory: str | None = None) -> Iterator[Bed]:
    """`directory`: where the temporary one is made; the machine's own place by default."""
    with ExitStack() as clean_up:
        base = Path(clean_up.enter_context(tempfile.TemporaryDirectory(prefix="cs.", dir=directory)))
        registry = clean_up.enter_context(images.registry(base / "registry"))
        # containerd's own driver; the other one asks systemd for each container.
        settings = {
            "log": {"level": "info"},
            "cgroup_driver": "cgroupfs",
            **({"handlers": handlers} if handlers else {}),
        }
        daemon = Daemon(base / "0", settings=settings, cgroup_parent=f"/cri-shim-bench-{name}")
        clean_up.callback(daemon.close)
        yield Bed(base, registry, daemon, clean_up)
