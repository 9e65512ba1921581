"""What commands print: sizes, ages, columns, and how far layers have come."""

from __future__ import annotations

import io

import pytest

from cri_shim.cli.progress import Bars, Lines, bar, shown
from cri_shim.cli.tables import age, columns, size
from cri_shim.pb.admin_pb2 import LayerProgress

ONE = "sha256:" + "1" * 64
TWO = "sha256:" + "2" * 64


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (30_100_000, "30.1 MB"),
        (5 * 10**9, "5 GB"),
        (7 * 10**15, "7000 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "now"), (0.5, "now"), (1, "1 second"), (59, "59 seconds"), (3700, "1 hour"), (200_000, "2 days")],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_columns_are_as_wide_as_they_have_to_be() -> None:
    assert columns([("A", "LONG"), ("abc", "d"), ("", "e")]) == "A    LONG\nabc  d\n     e\n"


def layer(digest: str, state: LayerProgress.State.ValueType, received: int, size: int = 1000) -> LayerProgress:
    return LayerProgress(digest=digest, state=state, received=received, size=size)


@pytest.mark.parametrize(
    ("received", "drawn"), [(0, ">" + " " * 29), (500, "=" * 15 + ">" + " " * 14), (1000, "=" * 30)]
)
def test_a_bar(received: int, drawn: str) -> None:
    line = bar(layer(ONE, LayerProgress.DOWNLOADING, received))
    assert line.startswith(f"{'1' * 13} [{drawn}] ")
    assert line.endswith(" downloading")


def test_elsewhere_each_step_is_a_line_and_is_said_once() -> None:
    out = io.StringIO()
    with shown(out) as progress:
        assert isinstance(progress, Lines)
        progress.show([layer(ONE, LayerProgress.WAITING, 0), layer(TWO, LayerProgress.DOWNLOADING, 1)])
        progress.show([layer(ONE, LayerProgress.DONE, 1000), layer(TWO, LayerProgress.DOWNLOADING, 500)])
    assert out.getvalue() == f"{'2' * 13}: downloading (1 kB)\n{'1' * 13}: done (1 kB)\n"


def test_in_a_terminal_bars_are_drawn_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "6")
    monkeypatch.setenv("COLUMNS", "40")
    out = io.StringIO()
    bars = Bars(out)
    bars.show([layer(ONE, LayerProgress.WAITING, 0)])
    bars.show([layer(ONE, LayerProgress.DONE, 1000)])
    first, second = out.getvalue().split("\x1b[1A")
    assert first.startswith("\x1b[2K")
    assert second.endswith("\n")
    assert all(len(line.rpartition("\x1b[2K")[2]) == 39 for line in out.getvalue().splitlines())
    bars.show([layer(f"sha256:{number:064}", LayerProgress.DONE, 1) for number in range(9)])
    assert out.getvalue().endswith("… and 6 more layers\n")
