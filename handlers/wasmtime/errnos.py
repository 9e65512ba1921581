"""The error numbers of WASI preview 1 (witx, `errno`) that functions of ours return."""

from __future__ import annotations

import enum


class Errno(enum.IntEnum):
    """A function's result, or a field of an event."""

    SUCCESS = 0
    ACCES = 2
    AGAIN = 6
    BADF = 8
    CONNABORTED = 13
    CONNRESET = 15
    FAULT = 21
    INVAL = 28
    IO = 29
    MFILE = 33
    NFILE = 41
    NOBUFS = 42
    NOMEM = 48
    NOTCONN = 53
    NOTDIR = 54
    NOTSUP = 58
    NXIO = 60
    PIPE = 64
    TIMEDOUT = 73
