"""Archives between a command's own streams and the daemon, which reads files only. No logic of its own."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from cri_shim.model.errors import InvalidArgument


@contextlib.contextmanager
def archive(name: str) -> Generator[Path]:
    """The file of that name; `-` is standard input, which is put into a file first."""
    if name != "-":
        yield Path(name)
        return
    if sys.stdin.isatty():
        raise InvalidArgument("standard input is a terminal", hint="name an archive, or give one on standard input")
    with tempfile.NamedTemporaryFile(prefix="cri-shim-", suffix=".tar") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        yield Path(file.name)


@contextlib.contextmanager
def archive_to_write(name: str) -> Generator[BinaryIO]:
    """A file that gets its name when it is whole; `-` is standard output."""
    if name == "-":
        if sys.stdout.isatty():
            raise InvalidArgument("standard output is a terminal", hint="name a file with --output")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = Path(f"{name}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.rename(name)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
