"""What a compiled module says of its growth, beside what it was made of.

Not how it comes to (`cri_shim.wire.wasm_growth`). Invariant: no module can forge it, as the name has the digest of all
of its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from cri_shim.wire.wasm_addresses import Addresses, as_it_came

_NAME: Final = "cri-shim.io/refused/"
_START: Final = "cri-shim.io/start/"


def note_name(digest: str) -> str:
    """How the name of the exported global begins."""
    return _NAME + digest


def start_name(digest: str) -> str:
    """By which its start function is exported, which is then to be called first."""
    return _START + digest


class Noting(Protocol):
    """A loaded module."""

    def last_export(self) -> str: ...

    def number(self, name: str, /) -> int: ...


@dataclass(frozen=True, slots=True)
class RefusalNote:
    """Of a module that notes; of others it is empty."""

    name: str = ""
    addresses: Addresses | None = None

    def refused(self, module: Noting) -> int:
        """Bytes that it wanted last and did not get."""
        return module.number(self.name) if self.name else 0

    def as_it_came(self, backtrace: str) -> str:
        """A backtrace with the addresses of the module before it was made to note."""
        return as_it_came(backtrace, self.addresses) if self.addresses else backtrace


def read_note(module: Noting, digest: str) -> RefusalNote:
    """Of a loaded module, whatever has become of its instance."""
    name, begin = module.last_export(), note_name(digest) + " "
    if not name.startswith(begin):
        return RefusalNote()
    return RefusalNote(name, Addresses.parse(name.removeprefix(begin)))
