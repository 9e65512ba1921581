"""What a runtime without a `features` command is able to do, found out by making a container that never runs.

Not for runtimes that can be asked. Invariant: nothing is left of the probe, and a probe that fails means "not able".
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from cri_shim.kernel import mounts, process
from cri_shim.model.errors import CriShimError

_SECONDS: Final = 10.0
_TARGET: Final = "/target"
_PROGRAM: Final = "/program"


async def has_recursive_read_only(
    program: str, flags: Sequence[str], spec_version: str, enter: Callable[[], None] | None
) -> bool:
    """Whether the option `rro` of a bind mount makes it read-only. One that does not know the word ignores it.

    `flags` are the runtime's global ones, `enter` as in `kernel.process.run`.
    """
    name = f"cri-shim-probe-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory(prefix="cri-shim-probe.") as directory:
        bundle = Path(directory)
        await asyncio.to_thread(_write_bundle, bundle, program, spec_version)
        pid_file = bundle / "pid"
        create = [program, *flags, "create", f"--bundle={bundle}", f"--pid-file={pid_file}", name]
        try:
            with contextlib.suppress(CriShimError, OSError, ValueError):
                done = await process.run(create, timeout=_SECONDS, enter=enter)
                return done.returncode == 0 and await asyncio.to_thread(_is_read_only, int(pid_file.read_text()))
            return False
        finally:
            with contextlib.suppress(CriShimError):
                await process.run([program, *flags, "delete", "--force", name], timeout=_SECONDS, enter=enter)


def _write_bundle(bundle: Path, program: str, spec_version: str) -> None:
    (bundle / "rootfs" / "dev").mkdir(parents=True)
    (bundle / "source").mkdir()
    config = {
        "ociVersion": spec_version,
        # It is looked for but not executed: the container is never started.
        "process": {"args": [_PROGRAM], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": _PROGRAM, "type": "bind", "source": program, "options": ["bind", "ro"]},
            {"destination": _TARGET, "type": "bind", "source": f"{bundle}/source", "options": ["rbind", "rro"]},
        ],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
    }
    (bundle / "config.json").write_bytes(msgspec.json.encode(config))


def _is_read_only(pid: int) -> bool:
    table = mounts.parse_mountinfo(Path(f"/proc/{pid}/mountinfo").read_bytes())
    return any(entry.target == Path(_TARGET) and "ro" in entry.options for entry in table)
