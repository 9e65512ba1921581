"""The engine's WASI configuration of a guest. Opens the directories and the output pipes."""

from __future__ import annotations

import wasmtime

from cri_shim.model.errors import FailedPrecondition
from handlers.wasmtime.guest_spec import GuestSpec
from handlers.wasmtime.output import Streams


def wasi_config(spec: GuestSpec, output: Streams) -> wasmtime.WasiConfig:
    """FailedPrecondition names what cannot be opened."""
    config = wasmtime.WasiConfig()
    settings: dict[str, object] = {"argv": list(spec.argv), "env": list(spec.env)}
    if spec.terminal:
        # Only of these does the engine find out, and tell the guest, that they are a terminal.
        config.inherit_stdin()
        config.inherit_stdout()
        config.inherit_stderr()
    else:
        settings |= {"stdout_file": output.stdout_path, "stderr_file": output.stderr_path}
        if spec.stdin:
            settings["stdin_file"] = spec.stdin
    for name, value in settings.items():
        setattr(config, name, value)
    for number in range(len(spec.listen.ports) if spec.listen is not None else 0):
        # Takes a descriptor, which the guest has for a socket: see `handlers.wasmtime.forward`.
        config.preopen_dir(spec.listen.nothing if spec.listen is not None else "", f"listener {number}", False)
    for preopen in spec.preopens:
        try:
            config.preopen_dir(preopen.host, preopen.guest, not preopen.readonly)
        except wasmtime.WasmtimeError:
            msg = f"mounts: cannot open the directory {preopen.host} as {preopen.guest}"
            raise FailedPrecondition(msg) from None
    return config
