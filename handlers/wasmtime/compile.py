"""The compiler: a task for a child of the zygote. Never called in the daemon.

A module's growth is put into functions that note when it was refused (`cri_shim.wire.wasm_growth`). Invariant: what
appears at the target is whole, and was made from the bytes of the digest.
"""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cri_shim.kernel.fs import atomic_write
from handlers.wasmtime.refusal_note import note_name, start_name

if TYPE_CHECKING:
    import wasmtime

_NICE = 10
_MOST_THREADS = 8
"""More would leave those of the node who wait for no compiler little, and take most of the address space for stacks."""
_MAGIC = b"\0asm"


def compile_module(arguments: Mapping[str, Any], fds: Sequence[int]) -> dict[str, int]:
    """Compile the module in `fds[0]`. Arguments: `digest`, `component`, `target`, `memory` (bytes), `seconds` (of CPU).

    Returns the size of the file at `target`. ValueError: other bytes than the digest's; wasmtime.WasmtimeError: no
    valid module, or one that needs what the engine does not offer.
    """
    os.nice(_NICE)
    os.environ["RAYON_NUM_THREADS"] = str(min(_MOST_THREADS, len(os.sched_getaffinity(0))))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (arguments["memory"], arguments["memory"]))
    # Where both are equal it is SIGKILL, which anybody could have sent.
    resource.setrlimit(resource.RLIMIT_CPU, (arguments["seconds"], arguments["seconds"] + 5))
    with os.fdopen(fds[0], "rb") as file:
        code = file.read()
    if f"sha256:{hashlib.sha256(code).hexdigest()}" != arguments["digest"]:
        msg = f"the module has changed since it was looked at: it is not {arguments['digest']}"
        raise ValueError(msg)
    target = Path(arguments["target"])
    return {"size": write_compiled(code, arguments["digest"], target, component=arguments["component"])}


def write_compiled(code: bytes, digest: str, target: Path, *, component: bool = False) -> int:
    """Compile `code` to a file that only the daemon's user can read or change; its size in bytes."""
    import wasmtime  # noqa: PLC0415  after the limits are set
    from wasmtime.component import Component  # noqa: PLC0415  likewise

    from handlers.wasmtime.engine import new_engine  # noqa: PLC0415  likewise

    if not code.startswith(_MAGIC):
        code = bytes(wasmtime.wat2wasm(code))
    compiled = bytes((Component(new_engine(), code) if component else _module(code, digest)).serialize())
    # Native code that was cut short by a power cut would be run: it has to be on disk before its name is.
    atomic_write(target, compiled, 0o600, sync=True)
    return len(compiled)


def _module(code: bytes, digest: str) -> wasmtime.Module:
    """One that notes what it is refused. Of code that is none the engine speaks as it came."""
    import wasmtime  # noqa: PLC0415  as above

    from cri_shim.wire.wasm_growth import note_refusals  # noqa: PLC0415  wanted here only
    from handlers.wasmtime.engine import new_engine  # noqa: PLC0415  as above

    engine, noting = new_engine(), note_refusals(code, note_name(digest), start_name(digest))
    if noting is not None:
        wasmtime.Module.validate(engine, code)
        with suppress(wasmtime.WasmtimeError):  # what was as large as a module may be is too large now
            return wasmtime.Module(engine, noting)
    return wasmtime.Module(engine, code)
