"""The engine's WASI configuration of a guest. Opens the directories and the output pipes.

By plain numbers, as `handlers.wasmtime.native`.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import wasmtime

from cri_shim.model.errors import FailedPrecondition
from handlers.wasmtime.c_interface import function
from handlers.wasmtime.guest_spec import GuestSpec, Preopen
from handlers.wasmtime.native import ADDRESS, SIZE, TEXT, TRUTH, error
from handlers.wasmtime.output import Streams

_new: Final = function("wasi_config_new", ADDRESS)
_delete: Final = function("wasi_config_delete", None, ADDRESS)
_set_argv: Final = function("wasi_config_set_argv", TRUTH, ADDRESS, SIZE, ADDRESS)
_set_env: Final = function("wasi_config_set_env", TRUTH, ADDRESS, SIZE, ADDRESS, ADDRESS)
_set_stdin: Final = function("wasi_config_set_stdin_file", TRUTH, ADDRESS, TEXT)
_set_stdout: Final = function("wasi_config_set_stdout_file", TRUTH, ADDRESS, TEXT)
_set_stderr: Final = function("wasi_config_set_stderr_file", TRUTH, ADDRESS, TEXT)
_inherit_stdin: Final = function("wasi_config_inherit_stdin", None, ADDRESS)
_inherit_stdout: Final = function("wasi_config_inherit_stdout", None, ADDRESS)
_inherit_stderr: Final = function("wasi_config_inherit_stderr", None, ADDRESS)
_preopen: Final = function("wasi_config_preopen_dir", TRUTH, ADDRESS, TEXT, TEXT, TRUTH)
_use: Final = function("wasmtime_context_set_wasi", ADDRESS, ADDRESS, ADDRESS)


def set_wasi(context: int, spec: GuestSpec, output: Streams, resources: ExitStack) -> None:
    """Give it to the store of that context. FailedPrecondition names what cannot be opened."""
    config = _new()
    try:
        _fill(config, spec, output, resources)
    except BaseException:
        _delete(config)
        raise
    failed = _use(context, config)  # which it belongs to from now on
    if failed:
        raise error(failed)


def _fill(config: int, spec: GuestSpec, output: Streams, resources: ExitStack) -> None:
    arguments, names, values = (
        _Strings(texts) for texts in (spec.argv, [name for name, _ in spec.env], [value for _, value in spec.env])
    )
    _check(_set_argv(config, len(spec.argv), arguments.at), "argv")
    _check(_set_env(config, len(spec.env), names.at, values.at), "env")
    if spec.terminal:
        # Only of these does the engine find out, and tell the guest, that they are a terminal.
        for inherit in (_inherit_stdin, _inherit_stdout, _inherit_stderr):
            inherit(config)
    else:
        _check(_set_stdout(config, output.stdout_path.encode()), "standard output")
        _check(_set_stderr(config, output.stderr_path.encode()), "standard error")
        if spec.stdin:
            _check(_set_stdin(config, spec.stdin.encode()), "standard input")
    for number in range(len(spec.listen.ports) if spec.listen is not None else 0):
        # Takes a descriptor, which the guest has for a socket: see `handlers.wasmtime.forward`.
        nothing = spec.listen.nothing if spec.listen is not None else ""
        _check(_preopen(config, nothing.encode(), f"listener {number}".encode(), False), "a listener")
    for preopen in spec.preopens:
        host = preopen.host
        if preopen.nodev and spec.worker is None and spec.shape.opens_files:  # a worker has a mount table of its own
            host = _without_devices(preopen, resources)
        if not _preopen(config, host.encode(), preopen.guest.encode(), not preopen.readonly):
            raise _unopened(preopen)


def _without_devices(preopen: Preopen, resources: ExitStack) -> str:
    """A path of the same directory. The daemon may open any device of the node, and who shares a volume make one."""
    from cri_shim.kernel import mounts  # noqa: PLC0415  workers have no use for it

    try:
        tree = mounts.without_devices(preopen.host)
    except OSError as error:
        raise _unopened(preopen, error) from None
    resources.callback(os.close, tree)
    return f"/proc/self/fd/{tree}"


def _unopened(preopen: Preopen, error: OSError | None = None) -> FailedPrecondition:
    why = f": {error.strerror}" if error is not None else ""
    return FailedPrecondition(f"mounts: cannot open the directory {preopen.host} as {preopen.guest}{why}")


def _check(done: bool, what: str) -> None:
    if not done:
        msg = f"the guest cannot be given {what}"
        raise wasmtime.WasmtimeError(msg)


class _Strings:
    """`char *[]` at `at`, as long as this lives."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode() for text in texts]
        self._text = bytearray(b"\0".join((*encoded, b"")))
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._text)) if encoded else 0
        self._pointers = array("Q")
        for text in encoded:
            self._pointers.append(at)
            at += len(text) + 1
        self.at: int = self._pointers.buffer_info()[0]
