"""Holds the README's reference to the configuration: every key with its default, and none that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import yaml

from cri_shim.config import Config
from handlers.oci.options import OciOptions
from handlers.wasmtime.options import WasmtimeOptions
from tests.support import markdown

ROWS = markdown.rows(Path(__file__).resolve().parents[2] / "README.md")
REQUIRED = "required"


def documented(heading: str) -> dict[str, object]:
    """Key and default of each row below a heading. A default stands as YAML; without one the key is required."""
    rows = [row for row in ROWS if row.headings[-1] == heading]
    found: dict[str, object] = {}
    for row in rows:
        (key,) = row.codes(0)
        found[key] = yaml.safe_load(row.codes(1)[0]) if row.codes(1) else row.cells[1]
    assert len(found) == len(rows), "a key has two rows"
    return found


def defaults(section: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The same of a type; the keys of a section inside stand behind its own."""
    for field in msgspec.structs.fields(section):
        key, default = prefix + field.encode_name, field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if isinstance(default, msgspec.Struct):
            yield from defaults(type(default), f"{key}.")
        else:
            yield key, REQUIRED if default is msgspec.NODEFAULT else msgspec.json.decode(msgspec.json.encode(default))


@pytest.mark.parametrize(
    ("heading", "section"),
    [
        ("Configuration", Config),
        ("Handlers of kind `oci`", OciOptions),
        ("Handlers of kind `wasmtime`", WasmtimeOptions),
    ],
)
def test_the_reference_has_every_key_and_its_default(heading: str, section: type[msgspec.Struct]) -> None:
    assert documented(heading) == dict(defaults(section))
