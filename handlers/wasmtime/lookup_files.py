"""What the C library's resolver reads, in the otherwise empty directory that a worker is shut up in.

The files of the pod, or those that the container has mounted in their place, so that a component resolves names as a
process of the container would. Invariant: nothing else is there, and nothing can be written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cri_shim.kernel import libc
from handlers.wasmtime.guest_spec import WorkerSpec

_HOSTS: Final = "etc/hosts"
_RESOLV_CONF: Final = "etc/resolv.conf"
_NSSWITCH_CONF: Final = "etc/nsswitch.conf"
_SOURCES: Final = "hosts: files dns\n"
_SIZE: Final = "size=64k,mode=755"
_SAFE: Final = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC


def furnish(worker: WorkerSpec, place: Path) -> None:
    """Put them there, in the calling process's own mount namespace. OSError; what does not exist is left out."""
    libc.mount("tmpfs", place, "tmpfs", _SAFE, _SIZE)
    (place / "etc").mkdir()
    (place / _NSSWITCH_CONF).write_text(_SOURCES)
    for source, target in ((worker.hosts, place / _HOSTS), (worker.resolv_conf, place / _RESOLV_CONF)):
        if source and Path(source).is_file():
            target.touch()
            libc.mount(source, target, None, libc.MS_BIND)
            libc.mount(None, target, None, libc.MS_BIND | libc.MS_REMOUNT | libc.MS_RDONLY | _SAFE)
    libc.mount(None, place, None, libc.MS_REMOUNT | libc.MS_RDONLY | _SAFE, _SIZE)
