"""How a guest ended, as the exit that the CRI shows. A pure function.

| what happened | code | reason |
|---|---|---|
| `_start` returned and no signal came, `proc_exit(0)` | 0 | Completed |
| `proc_exit(n)` | n modulo 256 | Error |
| ended by signal n | 128 + n | Error |
| a trap | 134, as of SIGABRT; the trap's text is the message | Error |
| abnormal, when it had been refused more memory by the limit | 137 | OOMKilled |
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Final

from cri_shim.model.container import Exit, Reason

_MESSAGE: Final = 4096
"""Characters of a trap's text that are kept; the log has it all."""

_WORDS: Final = 1024
"""Characters of what the engine says in one sentence."""
_IGNORED: Final = frozenset(
    {
        *(signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH),
        *(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    }
)


@dataclass(frozen=True, slots=True)
class Ending:
    """The facts. `code`: it called `proc_exit`; `signal`: it was told to stop; `trap`: the engine's words.

    `out_of_memory`: it needed more to be there at all; `refused`: bytes that it asked for, and went on without.
    """

    code: int | None = None
    signal: int | None = None
    trap: str = ""
    out_of_memory: bool = False
    refused: int = 0


def shorten(text: str, most: int = _WORDS) -> str:
    """As much of it as an error has room for."""
    return text if len(text) <= most else f"{text[:most]}…"


def ends_guest(number: int, stop_signal: int) -> bool:
    """Whether a signal ends a guest: a module has no handlers, so what counts is the default action (signal(7)).

    The container's stop signal always ends it; the signals that would stop or continue a process do nothing.
    """
    return number == stop_signal or (number > 0 and number not in _IGNORED)


def exit_from(ending: Ending, at: int) -> Exit:
    """`at` in Unix nanoseconds. What the guest said itself comes first, then what was done to it."""
    if ending.code == 0 or (ending.code is None and ending.signal is None and not ending.trap):
        return Exit(code=0, at=at, reason=Reason.COMPLETED)
    if (ending.out_of_memory or ending.refused) and ending.signal is None:
        return Exit(code=128 + signal.SIGKILL, at=at, reason=Reason.OOM_KILLED, message=_out_of_memory(ending))
    if ending.code is not None:
        return Exit(code=ending.code, at=at, reason=Reason.ERROR)
    if ending.signal is not None:
        return Exit(code=128 + ending.signal, at=at, reason=Reason.ERROR)
    return Exit(code=128 + signal.SIGABRT, at=at, reason=Reason.ERROR, message=ending.trap[:_MESSAGE])


def _out_of_memory(ending: Ending) -> str:
    message = "the memory limit was reached"
    if not ending.refused:
        return message
    how = f"code {ending.code}" if ending.code is not None else "a trap"
    return f"{message}: the module asked for {ending.refused} bytes more, was refused them, and ended with {how}"
