"""The streaming clients of Kubernetes (`tests/interop/client`, in Go), built once and driven as processes.

Without Go on the machine there is no client, and tests that want one say so. Invariant: no client outlives its test.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

SOURCE: Final = Path(__file__).parent.parent / "interop" / "client"
_GO: Final = "/usr/local/go/bin"
_PATIENCE: Final = 60.0


def go() -> str | None:
    """The Go tool, from PATH or from where its archive is unpacked."""
    return shutil.which("go", path=f"{os.environ.get('PATH', os.defpath)}:{_GO}")


def build(directory: Path) -> Path:
    """The program. Modules come from Go's cache or its proxy, as go.sum has them."""
    program = directory / "interop"
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    tool = go()
    assert tool is not None
    subprocess.run([tool, "build", "-o", str(program), "."], cwd=SOURCE, env=environment, check=True, timeout=600)
    return program


@dataclass
class Client:
    """A client that runs; what it reports is collected as it comes."""

    process: subprocess.Popen[bytes]
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self, event: str, within: float = _PATIENCE) -> dict[str, Any]:
        """The first event with this name."""
        deadline = time.monotonic() + within
        with self._changed:
            while not (found := [e for e in self.events if e["event"] == event]):
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise TimeoutError(f"no {event!r} within {within} s: {self.events[-20:]}")
        return found[0]

    def shows(self, text: bytes, within: float = _PATIENCE) -> None:
        """Wait until its standard output has this."""
        deadline = time.monotonic() + within
        with self._changed:
            while text not in self.output():
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise TimeoutError(f"no {text!r} within {within} s: {self.events[-20:]}")

    def output(self, stream: str = "stdout") -> bytes:
        return b"".join(base64.b64decode(e["data"]) for e in self.events if e["event"] == stream)

    def type(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def feed(self, data: bytes) -> None:
        """All of it, and the end."""
        with contextlib.suppress(BrokenPipeError):
            self.type(data)
        self.end_input()

    def end_input(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def end(self, within: float = _PATIENCE) -> tuple[int, str]:
        """Exit status and error, as the library tells them; -1 for an error that is no exit status."""
        ended = self.wait("end", within)
        self._reader.join(within)
        return ended["exit"], ended["error"]

    def join(self) -> None:
        """Of a process that has ended: nobody reads its output any more when this returns."""
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Interop:
    """The clients for one CRI socket."""

    program: Path
    socket: Path

    @contextlib.contextmanager
    def run(self, verb: str, transport: str, *arguments: str) -> Iterator[Client]:
        command = [str(self.program), verb, f"-endpoint=unix://{self.socket}", f"-transport={transport}", *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            client = Client(process)
            try:
                yield client
            finally:
                client.end_input()
                process.kill()
                client.join()

    def exec(
        self, transport: str, container: str, command: Sequence[str], *flags: str, stdin: bytes | None = None
    ) -> tuple[tuple[int, str], bytes, bytes]:
        """Run to the end: status with error, standard output, standard error."""
        tty = any(flag == "-tty" for flag in flags)
        flags = (*flags, *(() if tty else ("-stderr",)), *(() if stdin is None else ("-stdin",)))
        with self.run("exec", transport, f"-container={container}", *flags, "--", *command) as client:
            if stdin is not None:
                threading.Thread(target=client.feed, args=(stdin,), daemon=True).start()
            return client.end(), client.output(), client.output("stderr")
