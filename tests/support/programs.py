"""Programs that a daemon runs, each behind a fake of its name that fails when it is told to (`tests/fakes/faulty.sh`).

Without a plan a fake runs the real program. Invariant: a plan ends by its count, or when it is taken back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FAULTY = Path(__file__).parent.parent / "fakes" / "faulty.sh"
PLUGINS = Path("/usr/lib/cni")
RUNTIMES = ("crun", "runc")
ALWAYS = 1000


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs of one daemon, each behind a fake of its name."""

    directory: Path

    def install(self, name: str, real: Path) -> Path:
        (self.directory / "real").mkdir(parents=True, exist_ok=True)
        (self.directory / "real" / name).symlink_to(real)
        (self.directory / name).symlink_to(FAULTY)
        return self.directory / name

    def plan(self, name: str, verb: str, action: str, times: int = ALWAYS) -> None:
        """What `name` does the next times it is asked for `verb`; `runtime` are both."""
        if name == "runtime":
            for runtime in RUNTIMES:
                self.plan(runtime, verb, action, times)
            return
        (self.directory / f"{name}.{verb}.plan").write_text(f"{action} {times}\n")

    def release(self, name: str, verb: str) -> None:
        """Ends one plan; what hangs by it goes on."""
        (self.directory / f"{name}.{verb}.plan").unlink()

    def heal(self) -> None:
        for plan in self.directory.glob("*.plan"):
            plan.unlink()

    def calls(self, name: str) -> list[str]:
        """What `name` has been asked for so far."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / f"{name}.calls").read_text().split()
        return []

    @contextlib.contextmanager
    def missing(self, name: str) -> Iterator[None]:
        """The program is not there while the body runs."""
        program, aside = self.directory / name, self.directory / f"{name}.aside"
        program.rename(aside)
        try:
            yield
        finally:
            aside.rename(program)
