"""Our default AppArmor profile in the kernel: loaded when the daemon starts, and again when somebody took it away.

Not its text (`cri_shim.spec.apparmor`). Invariant: on a node without AppArmor nothing is asked and nothing started.
"""

from __future__ import annotations

import asyncio
import shutil
from typing import Final

from cri_shim.kernel import apparmor, process
from cri_shim.log import get_logger
from cri_shim.model.errors import CriShimError
from cri_shim.spec.apparmor import DEFAULT_PROFILE, default_profile

log = get_logger()

_PARSER: Final = "apparmor_parser"
_PARSER_PATH: Final = "/sbin:/usr/sbin:/usr/bin"
"""A service's PATH may lack these."""
_SECONDS: Final = 30.0


class AppArmor:
    """One for all handlers. `enabled` and `parser` do not change while the daemon runs."""

    def __init__(self) -> None:
        self.enabled = apparmor.is_enabled()
        self.parser = shutil.which(_PARSER) or shutil.which(_PARSER, path=_PARSER_PATH) or ""
        self.problem = ""
        """Why the default profile could not be loaded, empty when it could."""
        self._loading: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """Load the default profile, once; what is wrong is logged and in `problem`."""
        if self.enabled and self._loading is None:
            self._loading = asyncio.ensure_future(self._load())
        if self._loading is not None:
            await asyncio.shield(self._loading)

    async def profiles(self) -> frozenset[str]:
        """Names of the loaded profiles, the default one among them if it is to be had at all."""
        if not self.enabled:
            return frozenset()
        await self.load()
        found = await asyncio.to_thread(apparmor.profiles)
        if DEFAULT_PROFILE not in found and self.parser:
            # aa-remove-unknown(8) takes away what has no file in /etc/apparmor.d.
            if self._loading is not None and self._loading.done():
                self._loading = None
            await self.load()
            found = await asyncio.to_thread(apparmor.profiles)
        return found

    async def _load(self) -> None:
        self.problem = await self._try_to_load()
        if self.problem:
            log.error("no default AppArmor profile", profile=DEFAULT_PROFILE, why=self.problem)

    async def _try_to_load(self) -> str:
        if not self.parser:
            return f"AppArmor is on, but {_PARSER} is not installed"
        text = default_profile(await asyncio.to_thread(apparmor.own_label))
        try:
            argv = [self.parser, "--replace", "--skip-cache"]
            done = await process.run(argv, stdin=text.encode(), timeout=_SECONDS)
        except CriShimError as error:
            return str(error)
        return f"{_PARSER}: {done.text()}" if done.returncode != 0 else ""
