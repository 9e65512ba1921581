"""How far layers have come: bars that are drawn over each other in a terminal, a line for each step elsewhere."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Protocol, TextIO

from cri_shim.cli.tables import size
from cri_shim.model.ids import SHORT

if TYPE_CHECKING:
    from cri_shim.pb.admin_pb2 import LayerProgress

_STATES = ("waiting", "downloading", "unpacking", "done")
_BAR = 30


class Progress(Protocol):
    """Where the layers of one image are shown."""

    def show(self, layers: Iterable[LayerProgress]) -> None:
        """They have come so far."""

    def end(self) -> None:
        """No more of them."""


@contextlib.contextmanager
def shown(stream: TextIO) -> Generator[Progress]:
    """The kind that fits the stream."""
    progress: Progress = Bars(stream) if stream.isatty() else Lines(stream)
    try:
        yield progress
    finally:
        progress.end()


class Bars:
    """One line for each layer."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._height = 0

    def show(self, layers: Iterable[LayerProgress]) -> None:
        """Draw over what was drawn before. What does not fit is summed up in the last line: none must scroll away."""
        width, height = shutil.get_terminal_size()
        lines = [bar(layer)[: width - 1] for layer in layers]
        if len(lines) > height - 2:
            hidden = len(lines) - (height - 3)
            lines = [*lines[: height - 3], f"… and {hidden} more layers"]
        up = f"\x1b[{self._height}A" if self._height else ""
        self._stream.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        self._stream.flush()
        self._height = len(lines)

    def end(self) -> None:
        """What follows goes below."""
        self._height = 0


class Lines:
    """A line for each layer that begins to be something else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told: dict[str, int] = {}

    def show(self, layers: Iterable[LayerProgress]) -> None:
        """Tell what is new."""
        for layer in layers:
            if layer.state and self._told.get(layer.digest) != layer.state:
                self._told[layer.digest] = layer.state
                print(f"{_short(layer)}: {_STATES[layer.state]} ({size(layer.size)})", file=self._stream, flush=True)

    def end(self) -> None:
        """Nothing to tidy up."""


def bar(layer: LayerProgress) -> str:
    """`4f4fb700ef54a [=======>      ] 12.3 MB / 30.1 MB  downloading`."""
    share = layer.received / layer.size if layer.size else 1.0
    filled = int(_BAR * min(share, 1.0))
    drawn = "=" * filled if filled == _BAR else f"{'=' * filled}>".ljust(_BAR)
    return f"{_short(layer)} [{drawn}] {size(layer.received):>8} / {size(layer.size):<8} {_STATES[layer.state]}"


def _short(layer: LayerProgress) -> str:
    return layer.digest.removeprefix("sha256:")[:SHORT]
