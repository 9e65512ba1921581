"""How long the interpreter can keep the event loop waiting, and how it is kept short.

Whoever runs Python code holds the interpreter's lock: another thread for as long as a switch takes, the garbage
collector for the whole of a collection. Not about calls that block: those go to threads. Invariant: what `late_import`
brings in was loaded without a collection of all that there is, which takes 15 ms in a daemon that has just started.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
from types import ModuleType
from typing import Final

_SWITCH_SECONDS: Final = 0.0005
"""A thread in the middle of Python code lets the loop go on after this time; usually it is 5 ms."""


def settle() -> None:
    """For a daemon that is ready: let the loop come first, and collect only what comes about from now on."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.freeze()


async def late_import(name: str) -> ModuleType:
    """Import a heavy module when it is needed first, in a thread."""
    return await asyncio.to_thread(load, name)


def load(name: str) -> ModuleType:
    """The same for a caller that is in a thread. What is imported stays for ever: no collection looks at it again.

    Only what is new: with it all rubbish that there is at that moment stays too.
    """
    if name in sys.modules:
        return importlib.import_module(name)  # another thread may be about it
    gc.disable()
    try:
        module = importlib.import_module(name)
    finally:
        gc.enable()
    gc.freeze()
    return module
