"""What the file that a container would execute is, by its first bytes."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class EntryKind(enum.Enum):
    """The value reads after "the entrypoint is"."""

    ELF = "an ELF binary"
    SCRIPT = "a script"
    WASM = "a Wasm file"
    OTHER = "neither ELF nor script nor Wasm"
    MISSING = "not found in the image"


def entry_kind(head: bytes, name: str = "") -> EntryKind:
    """Classify the first four bytes of a file (ELF specification; kernel binfmt_script; Wasm core specification).

    Wasm text has no mark: it is told by a name in `.wat`, of a file that begins as such a text does.
    """
    if head.startswith(b"\x7fELF"):
        return EntryKind.ELF
    if head.startswith(b"#!"):
        return EntryKind.SCRIPT
    if head.startswith(b"\0asm"):
        return EntryKind.WASM
    if name.endswith(".wat") and head.lstrip()[:1] in {b"(", b";"}:
        return EntryKind.WASM
    return EntryKind.OTHER


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """What would be executed, before it has been looked up in the image."""

    word: str
    """argv[0]: absolute, relative to `cwd`, or a name to be found on `search`."""
    cwd: str
    search: str
    """The PATH of the process."""


def split_function(word: str) -> tuple[str, str]:
    """`path#function`, a Wasm module and the export to call, into its two parts; the function is empty without one."""
    path, _, function = word.rpartition("#")
    return (path, function) if path and function else (word, "")


def is_named_wasm(word: str) -> bool:
    """Whether a command, as `path#function` too, is named as Wasm files are."""
    return split_function(word)[0].endswith((".wasm", ".wat"))
