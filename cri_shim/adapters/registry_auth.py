"""Credentials for pulls that bring none: docker's `config.json`, and the helper programs that it names.

What the file means is decided in `cri_shim.wire.registry_auth`. Invariant: the file is read and the helper asked anew
for each pull, so that a secret that was replaced is used at once, and none is kept.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from cri_shim.kernel import process
from cri_shim.model.errors import FailedPrecondition
from cri_shim.model.refs import ImageRef
from cri_shim.wire.registry import Credentials
from cri_shim.wire.registry_auth import AuthFile, Helper, parse_helper_answer

_HELPER_SECONDS: Final = 30.0


class RegistryAuth:
    """The node's own credentials; without a file there are none."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    async def credentials(self, ref: ImageRef) -> Credentials | None:
        """For a reference, or None. FailedPrecondition, DeadlineExceeded when file or helper cannot be used."""
        if self._file is None:
            return None
        found = AuthFile(await asyncio.to_thread(_read, self._file), str(self._file)).find(ref)
        return await _ask(found) if isinstance(found, Helper) else found


async def _ask(helper: Helper) -> Credentials | None:
    done = await process.run((helper.program, "get"), stdin=helper.server.encode(), timeout=_HELPER_SECONDS)
    return parse_helper_answer(helper, done.returncode, done.stdout)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        msg = f"cannot read {file}: {error.strerror}"
        raise FailedPrecondition(msg, hint="look at images.auth_file") from error
