"""The tables of a Markdown page, so that a test can hold what the page says against what is true."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table and the headings that it is under, outermost first."""

    headings: tuple[str, ...]
    cells: tuple[str, ...]

    def codes(self, cell: int) -> list[str]:
        """What stands in a cell as code."""
        return _CODE.findall(self.cells[cell])


def rows(page: Path) -> list[Row]:
    """All rows but the head of each table. A pipe in a cell is not supported."""
    found: list[Row] = []
    headings: list[str] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("#"):
            marks, _, title = line.partition(" ")
            headings[len(marks) - 1 :] = [title]
        elif line.startswith("|---"):
            found.pop()
        elif line.startswith("| "):
            cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
            assert not before.startswith("|") or before.count("|") == line.count("|"), line
            found.append(Row(tuple(headings), cells))
    return found
