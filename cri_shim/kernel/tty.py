"""Terminals by their master end: size and end-of-file (ioctl_tty(2), termios(3)).

Not their bytes (`kernel.byte_streams`). Invariant: a terminal that is gone is success: its process has just ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios
import time

from cri_shim.model.streams import TerminalSize

_LOCAL_MODES = 3
_CHARACTERS = 6
_LARGEST = (1 << 16) - 1
_LOOK = 0.001


def set_size(master: int, size: TerminalSize) -> None:
    """Of the window; the kernel sends SIGWINCH to the processes in the foreground when it has changed."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", *_rows_and_columns(size), 0, 0))


def make_own(slave: int) -> None:
    """Make it the three standard streams, and the terminal of the calling process, which leads a session. OSError.

    From now on its special characters (Ctrl-C) are signals to this process.
    """
    for number in range(3):
        os.dup2(slave, number)
    os.close(slave)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def wait_for_owner(master: int, seconds: float) -> None:
    """Block until some process has made its slave its own; keys that come before that would be no signals to it."""
    deadline = time.monotonic() + seconds
    while os.tcgetpgrp(master) == 0 and time.monotonic() < deadline:
        time.sleep(_LOOK)


def end_of_file(master: int) -> bytes:
    """What to write so that a program that reads lines reads end-of-file; empty when it reads single keys.

    The terminal hands over an unfinished line at the first of the two, and the end at the second.
    """
    with contextlib.suppress(termios.error):
        modes = termios.tcgetattr(master)
        if modes[_LOCAL_MODES] & termios.ICANON:
            return 2 * bytes(modes[_CHARACTERS][termios.VEOF])
    return b""


def _rows_and_columns(size: TerminalSize) -> tuple[int, int]:
    return min(size.height, _LARGEST), min(size.width, _LARGEST)
