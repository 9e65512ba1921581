"""Two WASI functions of our own in place of the engine's: what a guest waits in, and what it ends by.

`poll_oneoff`, because nothing can interrupt the engine's own; `proc_exit`, because the engine's loses codes above 125.
All others stay native: a call into Python costs 50 times as much. And at each epoch of its engine the guest is asked
whether it may go on.

They are bound below the engine's Python classes, whose callbacks leave their exception in one variable of the process:
with many guests at once, each would now and then get another one's. Invariant: what a hook decides is written on its
own guest before it traps; nothing is read from the exception that comes out.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import wasmtime
from wasmtime import _ffi as ffi

from handlers.wasmtime import epoch, poll
from handlers.wasmtime.c_interface import ENDED, quick_function
from handlers.wasmtime.errnos import Errno
from handlers.wasmtime.native import error
from handlers.wasmtime.socket_calls import PARAMETERS, Calls, function
from handlers.wasmtime.sockets import Stopped

_export: Final = quick_function(
    "wasmtime_caller_export_get", ctypes.c_bool, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p
)
_context: Final = quick_function("wasmtime_caller_context", ctypes.c_void_p, ctypes.c_void_p)
_memory_size: Final = quick_function("wasmtime_memory_data_size", ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p)
_memory_data: Final = quick_function("wasmtime_memory_data", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_i32: Final = quick_function("wasm_valtype_new", ctypes.c_void_p, ctypes.c_uint8)
_types_new: Final = quick_function("wasm_valtype_vec_new", None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_signature_new: Final = quick_function("wasm_functype_new", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_signature_delete: Final = quick_function("wasm_functype_delete", None, ctypes.c_void_p)
_define_function: Final = quick_function(
    "wasmtime_linker_define_func_unchecked",
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_size_t,
    ctypes.c_char_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ffi.wasmtime_func_unchecked_callback_t,
    ctypes.c_void_p,
    ctypes.c_void_p,
)

_MODULE: Final = b"wasi_snapshot_preview1"
_MEMORY: Final = b"memory"
_LONGEST_WAIT: Final = 3600.0
"""Seconds; a longer sleep is several waits."""
_A_WAIT: Final = 0.001
"""Seconds from which on a poll has not been for nothing."""


class HookedGuest(Protocol):
    """What the hooks ask of a guest."""

    has_input: bool
    """Whether standard input may have something; else it is at its end from the start."""
    clock_base: int
    """`time.monotonic_ns()` at the zero of the guest's monotonic clock."""
    socket_calls: Calls | None
    """None = the guest has no sockets."""

    def leave(self, code: int) -> None:
        """The guest calls `proc_exit`."""
        ...

    def sleep(self, seconds: float) -> bool:
        """Wait; True as soon as the guest is to stop."""
        ...

    def pause(self) -> bool:
        """The engine's epoch has changed: wait for what is to be waited for; True when the guest is to stop."""
        ...

    def fail(self, error: Exception) -> None:
        """A hook has a defect."""
        ...

    def called(self, *, useful: bool) -> bool:
        """A call is over: wait if there are too many useless ones; True when the guest is to stop."""
        ...


_guests: dict[int, HookedGuest] = {}
_numbers = itertools.count(1)


class _Trapped(Exception):
    """The guest ends here."""


def _proc_exit(guest: HookedGuest, caller: Any, values: Any) -> bool:
    guest.leave(values[0].i32 & 0xFF)  # as of a process: exit(3) keeps the low byte
    raise _Trapped


def _poll_oneoff(guest: HookedGuest, caller: Any, values: Any) -> bool:
    subscriptions, events, count, stored = (values[index].i32 & 0xFFFFFFFF for index in range(4))
    began = time.monotonic()
    values[0].i32, asked = _poll(guest, _Memory(caller), (subscriptions, events, count, stored))
    # Both: where many wait for their turn, a call for nothing takes as long.
    return asked > _A_WAIT and time.monotonic() - began > _A_WAIT


def _poll(guest: HookedGuest, memory: _Memory, pointers: tuple[int, int, int, int]) -> tuple[int, float]:
    """The error, and the seconds that it had to wait, if nothing happened before."""
    subscriptions, events, count, stored = pointers
    if not 0 < count <= poll.MAX_SUBSCRIPTIONS:
        return Errno.INVAL, 0.0
    asked = memory.read(subscriptions, count * poll.SUBSCRIPTION_SIZE)
    if asked is None:
        return Errno.FAULT, 0.0
    calls = guest.socket_calls
    is_socket = calls.owns if calls is not None else _is_none
    call = poll.parse_poll(asked, _now(guest), has_input=guest.has_input, is_socket=is_socket)
    if isinstance(call, Errno):
        return call, 0.0
    happened, seconds = _wait(guest, call)
    size = (len(happened) // poll.EVENT_SIZE).to_bytes(4, "little")
    done = memory.write(events, happened) and memory.write(stored, size)
    return (Errno.SUCCESS if done else Errno.FAULT), seconds


def _is_none(_fd: int) -> bool:
    return False


def _wait(guest: HookedGuest, call: poll.Poll) -> tuple[bytes, float]:
    watched, ready, seconds = call.watched, dict[int, int](), 0.0
    while True:
        if watched and guest.socket_calls is not None:
            ready = guest.socket_calls.sockets.wait(watched, seconds)
        elif guest.sleep(seconds):
            raise _Trapped
        now = _now(guest)
        happened = call.events(now, ready)
        if happened:
            return happened, seconds
        seconds = min(call.wait(now) / 1e9, _LONGEST_WAIT)


def _now(guest: HookedGuest) -> poll.Now:
    return poll.Now(time.time_ns(), time.monotonic_ns() - guest.clock_base)


class _Memory:
    """The memory of the calling module; every access is checked against its size."""

    def __init__(self, caller: Any) -> None:
        item: Any = ffi.wasmtime_extern_t()
        self._address = self._size = 0
        if _export(caller, _MEMORY, len(_MEMORY), ctypes.byref(item)) and (
            item.kind == ffi.WASMTIME_EXTERN_MEMORY.value
        ):
            context = _context(caller)
            memory = ctypes.byref(item.of.memory)
            self._size = _memory_size(context, memory)
            self._address = _memory_data(context, memory) or 0

    def read(self, at: int, size: int) -> bytes | None:
        """A copy; None when it is not all inside the memory."""
        return ctypes.string_at(self._address + at, size) if at + size <= self._size else None

    def view(self, at: int, size: int) -> memoryview | None:
        """The bytes themselves; None when they are not all inside. Good until the guest goes on."""
        if at + size > self._size:
            return None
        return memoryview((ctypes.c_char * size).from_address(self._address + at)).cast("B")

    def write(self, at: int, data: bytes) -> bool:
        """Whether it fitted."""
        if at + len(data) > self._size:
            return False
        ctypes.memmove(self._address + at, data, len(data))
        return True


def _callback(hook: Any) -> Any:
    """A C function that runs `hook` for the guest whose number is its data, and traps when that raises.

    `hook` says whether it was good for anything, to the guest or to who it talks to.
    """

    def call(number: int, caller: Any, values: Any, _count: int) -> int:
        guest = _guests[number]
        try:
            if guest.called(useful=hook(guest, caller, values)):
                return _trap()
        except (_Trapped, Stopped):
            return _trap()
        except Exception as error:  # noqa: BLE001  C cannot take it; the guest ends and says so
            guest.fail(error)
            return _trap()
        return 0

    return ffi.wasmtime_func_unchecked_callback_t(call)


def _goes_on(number: int) -> bool:
    """`epoch.callback`."""
    guest = _guests[number]
    try:
        return not guest.pause()
    except Exception as error:  # noqa: BLE001  as above
        guest.fail(error)
        return False


def _trap() -> int:
    trap = ffi.wasmtime_trap_new(ENDED, len(ENDED))
    return ctypes.cast(trap, ctypes.c_void_p).value or 0


_AT_EPOCH: Final = epoch.callback(_goes_on)
_HOOKS: Final = (
    # Name, numbers of i32 parameters and results, implementation.
    (b"proc_exit", 1, 0, _callback(_proc_exit)),
    (b"poll_oneoff", 4, 1, _callback(_poll_oneoff)),
)


def _socket_hook(name: str, count: int) -> Any:
    def hook(guest: HookedGuest, caller: Any, values: Any) -> bool:
        if guest.socket_calls is None:
            raise _Trapped
        arguments = [values[index].i32 & 0xFFFFFFFF for index in range(count)]
        before = guest.socket_calls.sockets.traffic
        values[0].i32 = function(guest.socket_calls, name)(_Memory(caller), *arguments)
        return guest.socket_calls.sockets.traffic != before

    return _callback(hook)


_SOCKET_HOOKS: Final = tuple((name.encode(), count, 1, _socket_hook(name, count)) for name, count in PARAMETERS.items())


@contextmanager
def hooked(guest: HookedGuest, linker: wasmtime.Linker) -> Iterator[Hooked]:
    """Shadow the engine's functions in `linker` by ours; they work inside the block."""
    number = next(_numbers)
    _guests[number] = guest
    try:
        _define(linker, _MODULE, _HOOKS, number)
        yield Hooked(number)
    finally:
        del _guests[number]


@dataclass(frozen=True, slots=True)
class Hooked:
    """A guest with its hooks in place."""

    _number: int

    def watch_epoch(self, store: wasmtime.Store) -> None:
        """Have the store ask the guest at each epoch whether to go on, from the next one."""
        epoch.watch(store, _AT_EPOCH, self._number)

    def define_sockets(self, linker: wasmtime.Linker, module: str) -> None:
        """Define the functions on sockets, all of `PARAMETERS`, as imports from `module`."""
        _define(linker, module.encode(), _SOCKET_HOOKS, self._number)


def _define(
    linker: wasmtime.Linker, module: bytes, hooks: tuple[tuple[bytes, int, int, Any], ...], number: int
) -> None:
    for name, parameters, results, callback in hooks:
        # Of this engine: a type that another engine has seen aborts the process.
        signature = _signature_new(_i32s(parameters), _i32s(results))
        failed = _define_function(linker.ptr(), module, len(module), name, len(name), signature, callback, number, None)
        _signature_delete(signature)
        if failed:
            raise error(failed)


def _i32s(count: int) -> Any:
    """A vector of so many types, whose owner is the function that it is given to."""
    vector = ffi.wasm_valtype_vec_t()
    types = (ctypes.c_void_p * count)(*(_i32(ffi.WASM_I32) for _ in range(count)))
    _types_new(ctypes.byref(vector), count, types)
    return ctypes.byref(vector)
