"""The server's certificate: read from its files again when they have changed, so that a renewal needs no restart.

Invariant: a pair of files that does not fit together, as while it is being replaced, never takes the place of one that
does.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cri_shim.log import get_logger
from cri_shim.model.errors import FailedPrecondition

if TYPE_CHECKING:
    import ssl

log = get_logger()

Version = tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class Certificate:
    """Two PEM files: the certificate with its chain, and its key."""

    cert_file: Path
    key_file: Path
    _context: ssl.SSLContext | None = field(default=None, init=False)
    _version: Version = field(default=(), init=False)

    def context(self) -> ssl.SSLContext:
        """For the next connection. Blocks for a moment. FailedPrecondition when there has never been a good pair."""
        try:
            version = tuple((found.st_ino, found.st_mtime_ns, found.st_size) for found in map(os.stat, self._files()))
            if self._context is None or version != self._version:
                self._version = version
                self._context = self._load()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            if self._context is None:
                files = " and ".join(map(str, self._files()))
                msg = f"cannot read the certificate of streaming.tls from {files}: {error}"
                raise FailedPrecondition(msg) from error
            log.error("the changed certificate is not taken", error=str(error))
        return self._context

    def _files(self) -> tuple[Path, Path]:
        return self.cert_file, self.key_file

    def _load(self) -> ssl.SSLContext:
        import ssl  # noqa: PLC0415  where TLS is configured only

        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self._files(), password=_no_password)
        return context


def _no_password() -> str:
    """Without it the library would ask on the terminal."""
    msg = "the key is encrypted"
    raise ValueError(msg)
