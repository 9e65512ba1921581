"""The daemon as it is, with its loop watched: on SIGUSR2 it writes how late the loop has been since SIGUSR1.

For `loop_lag`. Not a mode of the daemon: nothing of this is in `cri_shim`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cri_shim import app, cli
from scripts.bench.lag import measured_lag

REPORT = "CRI_SHIM_LAG_REPORT"
"""The file that the figures are written to."""

_run = app._run  # noqa: SLF001  the coroutine that is the daemon


async def watched(*arguments: Any) -> int:
    loop = asyncio.get_running_loop()
    turns: list[float] = []
    turn = loop._run_once  # type: ignore[attr-defined]  # noqa: SLF001  one turn of the loop

    def timed_turn() -> None:
        begin = time.thread_time()
        turn()
        turns.append(time.thread_time() - begin)

    loop._run_once = timed_turn  # type: ignore[attr-defined]  # noqa: SLF001
    async with measured_lag() as lag:

        def begin() -> None:
            lag.clear()
            turns.clear()

        def report() -> None:
            figures = {"lag": lag.samples, "own": lag.own, "turns": turns}
            file = Path(os.environ[REPORT])
            file.with_suffix(".new").write_text(json.dumps(figures))
            file.with_suffix(".new").rename(file)

        loop.add_signal_handler(signal.SIGUSR1, begin)
        loop.add_signal_handler(signal.SIGUSR2, report)
        return await _run(*arguments)


if __name__ == "__main__":
    app._run = watched  # type: ignore[assignment]  # noqa: SLF001
    sys.exit(cli.main(sys.argv[1:]))
