"""What a runtime without a `features` command is able to do, found out by making a container that never runs.

Not for runtimes that can be asked. Invariant: nothing is left of the probe, and a probe that fails means "not able".
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from cri_shim.adapters.shielded import to_the_end
from cri_shim.kernel import fs, mounts, process
from cri_shim.model.errors import CriShimError

_SECONDS: Final = 10.0
_TARGET: Final = "/target"
_PROGRAM: Final = "/program"


async def has_recursive_read_only(
    runtime: Sequence[str], bundle: Path, spec_version: str, enter: Callable[[], None] | None
) -> bool:
    """Whether the option `rro` of a bind mount makes it read-only. One that does not know the word ignores it.

    `runtime` is the program with its global flags, `enter` as in `kernel.process.run`. Names follow from `bundle`, so
    what a killed daemon has left of its own probe is removed by the next one.
    """
    # To the end, whoever is cancelled: it takes a twentieth of a second, and half a probe would stay on the node.
    return await to_the_end(_probe(runtime, bundle, spec_version, enter))


async def _probe(runtime: Sequence[str], bundle: Path, spec_version: str, enter: Callable[[], None] | None) -> bool:
    name = f"cri-shim-probe-{hashlib.sha256(bytes(bundle)).hexdigest()[:16]}"
    await _remove(runtime, bundle, name, enter)
    try:
        with contextlib.suppress(CriShimError, OSError, ValueError, TimeoutError):
            await asyncio.to_thread(_write_bundle, bundle, runtime[0], spec_version)
            create = [*runtime, "create", f"--bundle={bundle}", f"--pid-file={bundle}/pid", name]
            return await _create(create, enter) and await asyncio.to_thread(_is_read_only, bundle / "pid")
        return False
    finally:
        await _remove(runtime, bundle, name, enter)


async def _create(argv: Sequence[str], enter: Callable[[], None] | None) -> bool:
    # Not `run`: the container that is made would hold the pipes of its output open.
    child = await asyncio.to_thread(process.spawn, argv, enter=enter)
    try:
        async with asyncio.timeout(_SECONDS):
            return await child.wait() == 0
    except TimeoutError:
        child.kill()
        await child.wait()
        raise


async def _remove(runtime: Sequence[str], bundle: Path, name: str, enter: Callable[[], None] | None) -> None:
    if not await asyncio.to_thread(bundle.exists):
        return
    with contextlib.suppress(CriShimError):
        await process.run([*runtime, "delete", "--force", name], timeout=_SECONDS, enter=enter)
    await asyncio.to_thread(fs.remove_tree, bundle)


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


def _is_read_only(pid_file: Path) -> bool:
    pid = int(pid_file.read_text(encoding="ascii"))
    table = mounts.parse_mountinfo(Path(f"/proc/{pid}/mountinfo").read_bytes())
    return any(entry.target == Path(_TARGET) and "ro" in entry.options for entry in table)
