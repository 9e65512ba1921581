"""What keeps the pauses of the event loop short; how short they are is for a measurement."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from cri_shim.kernel import pauses


async def test_nothing_is_collected_while_a_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy_module.py").write_text(
        "import gc, threading\nfound = gc.isenabled(), threading.current_thread()\n"
    )
    (tmp_path / "broken_module.py").write_text("raise ImportError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    frozen = gc.get_freeze_count()
    try:
        enabled, thread = (await pauses.late_import("heavy_module")).found
        assert not enabled
        assert thread.name.startswith("asyncio")
        assert gc.get_freeze_count() > frozen
        frozen = gc.get_freeze_count()
        await pauses.late_import("heavy_module")
        assert gc.get_freeze_count() <= frozen  # or rubbish stays for ever with each call
        with pytest.raises(ImportError, match="broken"):
            await pauses.late_import("broken_module")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        sys.modules.pop("heavy_module", None)


def test_the_loop_comes_first() -> None:
    usual = sys.getswitchinterval()
    try:
        pauses.settle()
        assert sys.getswitchinterval() < 0.001
    finally:
        sys.setswitchinterval(usual)
        gc.unfreeze()
